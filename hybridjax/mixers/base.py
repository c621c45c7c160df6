"""The mixer contract: three methods, one context, and states that are values.

A mixer mixes information along the sequence. It is an `nnx.Module` whose every leaf is a trained
float parameter; slopes, windows and tables come from static attributes. Its constructor takes
`(width, key)` and, keyword-only, its options. See docs/architecture.md for the laws.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.sharding import place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer may know besides the stream.

    Attributes:
      positions: index of each token in its document.
      segments: document of each token in its row, from 1; 0 is padding.
      logit_base: `a` of log-scaled attention logits; None (as in training) does not scale.
      key: for mixers that draw noise; None where nothing is drawn.
      shared: values that layers below have published, by name.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    logit_base: Float[Array, ""] | None = None
    key: jax.Array | None = None
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_rows(cls, tokens: Int[Array, "B T"], **rest) -> "Context":
        """The context of rows that hold one whole document each."""
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        segments = jnp.ones((batch, length), jnp.int32)
        return cls(place(positions, "batch", "length"), place(segments, "batch", "length"), **rest)

    def publish(self, values: dict[str, Any]) -> "Context":
        return dataclasses.replace(self, shared={**self.shared, **values})


def state_field(*axes: str | None, placement: str = "device"):
    """A field of a decoding state: its logical axes, and where it lives ("device" or "host")."""
    return dataclasses.field(metadata={"axes": axes, "placement": placement})


def state(cls):
    """Makes a class a decoding state: a frozen dataclass that is a pytree of arrays."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def place_state(state: Any) -> Any:
    """The state with each array where its field's axes say."""
    placed = {
        field.name: place(getattr(state, field.name), *field.metadata["axes"])
        for field in dataclasses.fields(state)
    }
    return dataclasses.replace(state, **placed)


def batch_axes(state: Any) -> Any:
    """The state with, for each array, the index of its batch axis."""
    axes = {f.name: f.metadata["axes"].index("batch") for f in dataclasses.fields(state)}
    return dataclasses.replace(state, **axes)


class Mixer(nnx.Module):
    """Base of all mixers.

    Class attributes:
      publishes: names that `__call__` and `extend` return values for, as a last result.
      reads: names that must be in `ctx.shared`, from the nearest publisher below.
      adds: False for a mixer that only publishes: its output is None, nothing joins the stream.
      align: documents of a packed row must start at multiples of this many tokens.
      reach: tokens before its own on which what it gives for a token depends, apart from what it
        reads of others; None: all.
    """

    publishes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    adds: bool = True
    align: int = 1
    reach: int | None = None

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        """The parallel form over whole rows."""
        raise NotImplementedError

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """The state before the first token, every buffer preallocated; has `length [B]`."""
        raise NotImplementedError

    def extend(
        self, x: Float[Array, "B T D"], state: Any, ctx: Context
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Consumes T >= 1 tokens after what the state has seen.

        Rows may differ in progress. Padding (segment 0) is at the right, and changes neither
        outputs nor state. A row holds one document.
        """
        raise NotImplementedError


def new_length(length: Int[Array, " B"], ctx: Context) -> Int[Array, " B"]:
    """A state's length after the real tokens of `ctx`."""
    return length + jnp.sum(ctx.segments > 0, axis=1, dtype=length.dtype)
