"""Hugging Face directories: config.json, safetensors and a tokenizer, read and written.

`family.py` says what a family of models is, with a module for each; `tensors.py` knows the files,
`weights.py` where the tensors go in a decoder.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np

from hybridjax.config import ModelConfig, UserError
from hybridjax.files import one_line, read_json, write_json
from hybridjax.huggingface import weights
from hybridjax.huggingface.family import Family, differences
from hybridjax.huggingface.glm4 import GLM4
from hybridjax.huggingface.hypenet import HYPENET
from hybridjax.huggingface.llama import LLAMA
from hybridjax.huggingface.qwen3 import QWEN3
from hybridjax.huggingface.tensors import Tensors, write
from hybridjax.models.decoder import Decoder

FAMILIES = {family.architecture: family for family in (QWEN3, LLAMA, GLM4, HYPENET)}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SETTINGS = "config.json"
RENAMED = ("rope_parameters", "dtype")  # what transformers 5 calls names that we write
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "chat_template.jinja", "generation_config.json")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A directory whose config.json was read, and nothing else yet."""

    directory: pathlib.Path
    family: Family
    settings: dict[str, Any]
    model: ModelConfig

    @property
    def logit_base(self) -> float | None:
        """The base of log-scaled attention logits that it was published with."""
        return self.family.logit_base and self.family.logit_base(self.settings)

    def load(self, model: ModelConfig | None = None) -> Decoder:
        """The decoder on the mesh that is set; as `model` says, if it is the same network.

        Raises:
          UserError: `model` is another one, or the tensors do not fit.
        """
        if model is not None and (apart := differences(model, self.model)):
            raise UserError(
                f"{self.directory} holds another model than the configuration "
                f"({'; '.join(apart[:5])}): take config.model from it"
            )
        return weights.load(model or self.model, self.family, Tensors(self.directory))


def is_huggingface(path: str | pathlib.Path) -> bool:
    """Whether a directory has a Hugging Face config.json rather than that of a run."""
    settings = read_json(pathlib.Path(path) / SETTINGS)
    return bool(settings) and ("architectures" in settings or "model_type" in settings)


def open_directory(path: str | pathlib.Path) -> Pretrained:
    """Raises `UserError` where there is no such directory, or a model that we do not have."""
    directory = pathlib.Path(path)
    settings = read_json(directory / SETTINGS)
    if settings is None:
        raise UserError(f"{path} is no Hugging Face directory (no {SETTINGS}): correct the path")
    family, settings = _family(settings, directory), _with_old_names(settings)
    try:
        model = family.to_model(settings)
    except KeyError as error:
        raise UserError(f"{directory / SETTINGS} lacks {error}: fetch it again") from error
    return Pretrained(directory, family, settings, model)


def save_directory(
    path: str | pathlib.Path,
    config: ModelConfig,
    model: Decoder,
    *,
    logit_base: float | None = None,
    settings: dict[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
) -> Family:
    """Writes tensors, then config.json: a directory without it is not complete.

    Args:
      settings: more of config.json, such as the ids of special tokens; the model's own prevail.

    Raises:
      UserError: no family has such a model, or the directory has a model already.
    """
    directory = pathlib.Path(path)
    if (directory / SETTINGS).exists():
        raise UserError(f"{directory} has a {SETTINGS} already: choose another directory")
    family = family_of(config)
    with one_line(f"cannot write {directory}: ", "choose another directory"):
        directory.mkdir(parents=True, exist_ok=True)
    stored = DTYPES[dtype]
    sizes = {
        name: stored.itemsize * int(np.prod(shape))
        for name, shape in weights.shapes(config, family).items()
    }
    tensors = ((n, x.astype(stored)) for n, x in weights.tensors_of(config, family, model))
    if jax.process_index() != 0:
        for _ in tensors:  # takes its part in gathering them
            pass
        return family
    write(directory, sizes, tensors, shard_bytes)
    other = {name: x for name, x in (settings or {}).items() if name not in RENAMED}
    named = dict(architectures=[family.architecture], model_type=family.model_type)
    whole = other | family.to_settings(config, logit_base) | named | dict(torch_dtype=dtype)
    with one_line(f"cannot write {directory}: ", "make room"):
        write_json(directory / SETTINGS, whole)
    return family


def family_of(config: ModelConfig) -> Family:
    """The family that has such a model: one whose config.json, read again, says the same."""
    known = {name: f for name, f in FAMILIES.items() if _has_layers_of(f, config)}
    apart = {name: _apart(config, family) for name, family in known.items()}
    if not apart:
        raise UserError(
            f"no Hugging Face family has all the kinds of layers of {config.layers!r}: there are "
            f"{', '.join(FAMILIES)}"
        )
    nearest = min(apart, key=lambda name: len(apart[name]))
    if apart[nearest]:
        raise UserError(
            f"no Hugging Face family has this stack; {nearest} is the nearest, but for "
            f"{'; '.join(apart[nearest][:5])}"
        )
    return FAMILIES[nearest]


def _apart(config: ModelConfig, family: Family) -> list[str]:
    try:
        return differences(config, family.to_model(family.to_settings(config, None)))
    except UserError as refused:
        return [str(refused)]


def _has_layers_of(family: Family, config: ModelConfig) -> bool:
    blocks = [config.blocks[letter] for letter in set(config.layers)]
    return all(
        len(block.mixers) == 1
        and block.mixers[0]["type"] in family.layers
        and block.mlp is not None
        and block.mlp["type"] == "swiglu"
        for block in blocks
    )


def copy_companions(source: str | pathlib.Path, target: str | pathlib.Path) -> None:
    """Copies the small files that are there: a tokenizer's, and what generation should be like."""
    source, target = pathlib.Path(source), pathlib.Path(target)
    source = source if source.is_dir() else source.parent
    with one_line(f"cannot write {target}: ", "make room or correct the path"):
        target.mkdir(parents=True, exist_ok=True)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def _family(settings: dict[str, Any], directory: pathlib.Path) -> Family:
    named = settings.get("architectures") or [None]
    by_type = {family.model_type: family for family in FAMILIES.values()}
    family = FAMILIES.get(named[0]) if named[0] else by_type.get(settings.get("model_type"))
    if family is None:
        raise UserError(
            f"{directory} holds a {named[0] or settings.get('model_type')}: supported are "
            f"{', '.join(FAMILIES)}"
        )
    return family


def _with_old_names(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 has all that concerns rotary positions under `rope_parameters`."""
    rope = settings.get("rope_parameters")
    if not rope:
        return settings
    apart = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: x for name, x in rope.items() if name not in apart}
    return settings | apart | {"rope_scaling": scaling or None}
