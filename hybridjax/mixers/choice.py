"""A choice between mixers, made per layer by traced data.

A sweep over architectures (HALO's layer selection, the search for a window pattern) compiles once:
every layer of the stack holds all options, and an integer per layer says which one runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError, build
from hybridjax.mixers import MIXERS
from hybridjax.mixers.base import Context, Mixer


class Choice(Mixer):
    def __init__(self, width: int, key: jax.Array, *, options: Sequence[Mapping[str, Any]]):
        """`options`: specs of mixers that publish and read nothing."""
        keys = jax.random.split(key, len(options))
        built = [build(o, MIXERS, width, k) for o, k in zip(options, keys, strict=True)]
        for mixer in built:
            if mixer.publishes or mixer.reads:
                raise UserError(f"choice cannot hold {type(mixer).__name__}: it shares values")
        self.options = nnx.List(built)

    @property
    def align(self) -> int:
        return max(option.align for option in self.options)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, selected: Int[Array, ""]
    ) -> Float[Array, "B T D"]:
        """Runs option number `selected`."""
        return jax.lax.switch(selected, [lambda x, m=m: m(x, ctx) for m in self.options], x)

    def init_state(self, batch, max_length, dtype):
        raise UserError("choice trains and measures whole rows: build the chosen stack to decode")
