"""The convolution of rows that are split along a mesh axis, a contiguous part on each device.

A part sees the W - 1 inputs before it. They may lie on several devices, for parts may be shorter
than that, or padding; so what a device knows of them is composed by a scan over the devices.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_convolution import xla
from pallas_kernels.context import document_continues, end_documents, on_split_row


class Tail(NamedTuple):
    """What a part makes of the inputs before it: the oldest `count` make place for its own."""

    own: Float[Array, "B W-1 D"]  # newest last; zeros where it has fewer
    count: Int[Array, "B"]  # W - 1 where a document ends in the part or at its beginning

    def __call__(self, before: Float[Array, "B W-1 D"] | None) -> Float[Array, "B W-1 D"]:
        if before is None:
            return self.own
        size = before.shape[1]
        index = self.count[:, None, None] + jnp.arange(size)[:, None]
        shifted = jnp.take_along_axis(before, jnp.minimum(index, size - 1), axis=1)
        return self.own + jnp.where(index < size, shifted, 0)

    def then(self, later: "Tail") -> "Tail":
        size = self.own.shape[1]
        return Tail(later(self.own), jnp.minimum(self.count + later.count, size))


def split_causal_convolution(
    op: Callable, axis: str, x, kernel, *, initial_state, segments, output_final_state
):
    """`op`, the convolution of a whole row, on this device's part of it.

    `initial_state` and the final state are those of the row, the same on every device.
    """
    if kernel.shape[1] == 1:  # a token sees itself only
        return op(x, kernel, initial_state=initial_state, segments=segments,
                  output_final_state=output_final_state)
    segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
    continues = document_continues(segments, axis)
    part = _tail(x, kernel.shape[1] - 1, segments, continues)
    identity = Tail(jnp.zeros_like(part.own), jnp.zeros_like(part.count))
    if initial_state is not None:
        initial_state = initial_state.astype(x.dtype)
    op = functools.partial(op, x, kernel, segments=segments)
    return on_split_row(op, part, identity, continues, axis, initial_state, output_final_state)


def _tail(x, size, segments, continues):
    first, last = end_documents(segments)
    count = jnp.minimum(jnp.sum(segments != 0, axis=1), size)
    count = jnp.where(continues & (first == last), count, size)
    return Tail(xla.final_state(x, jnp.zeros_like(x, shape=(x.shape[0], size, x.shape[2])),
                                segments), count)
