"""Where documents come from: the registry of sources and what a source is.

A document is `dict(tokens int32 [n], loss_weights float32 [n], answers int32 [n])`;
`loss_weights[i]` and `answers[i]` speak of `tokens[i]` as a *target*. `answers` is 0, or i for the
i-th answer of the document. A document of n tokens gives n - 1 positions of input and target, so
text ends with the tokenizer's end-of-document token, which is then its last target.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from hybridjax import config
from hybridjax.config import UserError
from hybridjax.data.tokenizer import Tokenizer

SOURCES = {
    "embedded": "hybridjax.data.text:Embedded",
    "retrieval": "hybridjax.data.retrieval:Retrieval",
    "variables": "hybridjax.data.variables:Variables",
    "words": "hybridjax.data.words:FrequentWords",
    "babilong": "hybridjax.data.babilong:BABILong",
    "text": "hybridjax.data.files:Text",
    "parquet": "hybridjax.data.files:Parquet",
    "arrayrecord": "hybridjax.data.files:ArrayRecord",
    "tokens": "hybridjax.data.files:Tokens",
}
SPLITS = ("train", "tune", "heldout")  # `tune` chooses settings, so that `heldout` stays unseen

Document = dict[str, np.ndarray]


class Source(Protocol):
    def __init__(self, tokenizer: Tokenizer, seq_len: int, split: str, seed: int, **options): ...

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset | grain.IterDataset:
        """The documents of one stream: every `shard.step`-th one, from `shard.start` on.

        A `MapDataset` is shuffled and repeated by the pipeline, unless its length is `sys.maxsize`
        (endless); an `IterDataset` is repeated.
        """
        ...


def source(type: str, *, weight: float = 1.0, **options: Any) -> ConfigDict:
    """The spec of a source for a config file: one of SOURCES, or `package.module:Class`."""
    spec = config.spec(type, SOURCES, **options)
    spec.weight = weight
    return spec


def build_source(
    spec: Mapping[str, Any], tokenizer: Tokenizer, *, seq_len: int, split: str, seed: int
) -> Source:
    """The source that `spec` names, over one of SPLITS."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
    options = {name: value for name, value in spec.items() if name not in ("type", "weight")}
    checked = config.spec(spec["type"], SOURCES, **options)
    return config.build(checked, SOURCES, tokenizer, seq_len, split, seed)


def text_document(ids: Int[np.ndarray, " n"], *, loss_weight: float = 1.0) -> Document:
    """Plain text: every token is a target of the same weight, none is an answer."""
    return dict(
        tokens=np.asarray(ids, np.int32),
        loss_weights=np.full(len(ids), loss_weight, np.float32),
        answers=np.zeros(len(ids), np.int32),
    )


def encode(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " n"]:
    """The ids of a whole document, its end included."""
    return np.append(tokenizer.encode(text), np.int32(tokenizer.eos))
