"""English prose that ships with the package, so that everything runs without a download."""

import functools
import hashlib
import lzma
import pathlib

import grain

from hybridjax.config import UserError
from hybridjax.data.sources import SPLITS, encode, text_document
from hybridjax.data.tokenizer import Tokenizer

FILE = pathlib.Path(__file__).parent / "embedded" / "pydoc_topics.txt.xz"
SHA256 = "950614694adc8b645a78f844dfd9789d51f3ccffcacd83804c2b3ae0ae1e2c44"
SHARE = {"heldout": 0.1, "tune": 0.1}  # of the bytes; the rest is for training


def documents(split: str) -> tuple[str, ...]:
    """The embedded documents (Python's language reference, ASCII) of one split.

    Whole documents, and no paragraph occurs twice, so that the splits share no text.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
    return _splits()[split]


@functools.cache
def _splits() -> dict[str, tuple[str, ...]]:
    data = lzma.decompress(FILE.read_bytes())
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise UserError(f"{FILE} has sha256 {found}, not {SHA256}: reinstall hybridjax")
    texts = data.decode("ascii").split("\0")
    # In the order of a hash, each document goes to the first split with room for it.
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    room = {split: share * len(data) for split, share in SHARE.items()}
    for text in texts:
        split = next((s for s in room if len(text) <= room[s]), "train")
        if split in room:
            room[split] -= len(text)
        splits[split].append(text)
    return {split: tuple(texts) for split, texts in splits.items()}


class Embedded:
    """The embedded documents, cut into pieces that fill a row each (one token of overlap, so that
    every token is a target once), so that shuffling mixes them well."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        loss_weight: float = 1.0,
    ):
        self._pieces = []
        for text in documents(split):
            ids = encode(tokenizer, text)
            self._pieces += [ids[i : i + seq_len + 1] for i in range(0, len(ids) - 1, seq_len)]
        self._loss_weight = loss_weight

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset:
        pieces = grain.MapDataset.source(self._pieces)[shard]
        return pieces.map(lambda ids: text_document(ids, loss_weight=self._loss_weight))
