"""A finished or running training, opened to be measured or talked to."""

import dataclasses
import pathlib
from typing import Any

import jax

from hybridjax.checkpoint import load_config, restore_model
from hybridjax.config import Config, typed
from hybridjax.data.tokenizer import Tokenizer, load_tokenizer
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: pathlib.Path
    config: Config
    model: Decoder
    tokenizer: Tokenizer
    step: int
    metadata: dict[str, Any]

    @property
    def logit_base(self) -> float | None:
        """The base of the log scaling that evaluation chose; None: no scaling."""
        return self.metadata.get("logit_base")


def open_run(workdir: str | pathlib.Path, step: int | None = None) -> Run:
    """The model of a work directory's newest checkpoint, or of `step`, on the run's mesh.

    Raises `UserError` where there is no run, or no checkpoint that can be read.
    """
    config = typed(load_config(workdir))
    jax.set_mesh(make_mesh(config.mesh))
    new_model = lambda: place_parameters(Decoder(config.model, jax.random.key(0)))
    abstract = jax.jit(new_model).eval_shape()
    model, step, metadata = restore_model(workdir, abstract, step)
    tokenizer = load_tokenizer(config.data.tokenizer)
    return Run(pathlib.Path(workdir), config, model, tokenizer, step, metadata)
