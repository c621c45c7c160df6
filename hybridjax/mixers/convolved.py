"""Mixers whose q, k, v pass a short convolution before a recurrent state takes them in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.convolution import ShortConvolution
from hybridjax.layers.linear import Linear
from hybridjax.mixers.base import Context, Mixer, new_length, place_state, state, state_field

_TAIL = ("batch", None, "heads")


@state
class ConvolvedState:
    """`4 B H K V` bytes and `B (W - 1) (2 G K + H V)` elements, whatever the length."""

    recurrent: Float[Array, "B H K V"] = state_field("batch", "heads", None, None)
    query_tail: Float[Array, "B W-1 GK"] = state_field(*_TAIL)
    key_tail: Float[Array, "B W-1 GK"] = state_field(*_TAIL)
    value_tail: Float[Array, "B W-1 HV"] = state_field(*_TAIL)
    length: Int[Array, " B"] = state_field("batch")


class ConvolvedMixer(Mixer):
    """A subclass makes the six layers named here, and reads and writes the state.

    G key heads, H value heads with a state each.
    """

    query: Linear
    key: Linear
    value: Linear
    query_convolution: ShortConvolution
    key_convolution: ShortConvolution
    value_convolution: ShortConvolution
    state_shape: tuple[int, int, int]  # H, K, V

    def _read(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T GK"],
        k: Float[Array, "B T GK"],
        v: Float[Array, "B T HV"],
        recurrent: Float[Array, "B H K V"] | None,
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H K V"]]:
        """The layer's output and the state behind it; q, k, v are convolved."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        return self._mix(x, None, (None,) * 3, ctx)[0]

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> ConvolvedState:
        tails = [
            jnp.zeros((batch, c.size - 1, c.kernel.shape[0]), dtype) for c in self._convolutions
        ]
        recurrent = jnp.zeros((batch, *self.state_shape))
        return place_state(ConvolvedState(recurrent, *tails, jnp.zeros(batch, jnp.int32)))

    def extend(self, x: Float[Array, "B T D"], state: ConvolvedState, ctx: Context):
        tails = state.query_tail, state.key_tail, state.value_tail
        y, recurrent, tails = self._mix(x, state.recurrent, tails, ctx)
        return y, ConvolvedState(recurrent, *tails, new_length(state.length, ctx))

    @property
    def _convolutions(self) -> tuple[ShortConvolution, ...]:
        return self.query_convolution, self.key_convolution, self.value_convolution

    def _mix(self, x, recurrent: jax.Array | None, tails, ctx: Context):
        rows = [project(x) for project in (self.query, self.key, self.value)]
        parts = zip(self._convolutions, rows, tails, strict=True)
        convolved = [convolve(row, ctx.segments, tail) for convolve, row, tail in parts]
        qkv, tails = zip(*convolved, strict=True)
        y, recurrent = self._read(x, *qkv, recurrent, ctx.segments)
        return y, recurrent, tails
