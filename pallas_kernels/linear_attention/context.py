"""Linear attention of rows that are split along a mesh axis, a contiguous part on each device.

To the state that enters it, a part of a row is an affine map,

    S_out = keep S_in + update,
    keep = exp(sum_t decay_t),    update = sum_j exp(sum_{t > j} decay_t) k_j v_j^T,

where keep is 0 if a document ends in the part or at its beginning, update is that of the part's
last document, and padding is the identity. Maps compose: after (keep, update) another (keep',
update') is (keep' keep, keep' update + update'). So a scan of the maps over the devices gives the
state that enters each; it moves O(B H K V) numbers however long the rows are.

The maps are made first, and the op then runs once, from the state that enters. The other order
(the op from zero, then the entering state's part of the outputs) costs as many products. But it
passes over q and twice over o where this passes over k and v, rounds o twice, and cannot begin the
exchange before the op has ended; here the XLA form's work within chunks can hide the exchange.

The gradient is the transposed scan, from the op's own gradient by its initial state.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.context import document_continues, end_documents, on_split_row


class AffineMap(NamedTuple):
    """`S -> keep S + update`."""

    keep: Float[Array, "B H 1 1"]
    update: Float[Array, "B H K V"]

    def __call__(self, state: Float[Array, "B H K V"] | None) -> Float[Array, "B H K V"]:
        return self.update if state is None else self.keep * state + self.update

    def then(self, later: "AffineMap") -> "AffineMap":
        return AffineMap(self.keep * later.keep, later(self.update))


def split_linear_attention(
    op: Callable, axis: str, q, k, v, decay, *, initial_state, segments, output_final_state
):
    """`op`, the linear attention of a whole row, on this device's part of it.

    `initial_state` and the final state are those of the row, the same on every device.
    """
    part = _affine_map(k, v, decay, segments)
    continues = None
    if segments is not None:
        continues = document_continues(segments, axis)
        part = part._replace(keep=jnp.where(continues[:, None, None, None], part.keep, 0))
    identity = AffineMap(jnp.ones_like(part.keep), jnp.zeros_like(part.update))
    op = functools.partial(op, q, k, v, decay, segments=segments)
    return on_split_row(op, part, identity, continues, axis, initial_state, output_final_state)


def _affine_map(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay: Float[Array, "H"] | Float[Array, "B T H"],
    segments: Int[Array, "B T"] | None,
) -> AffineMap:
    """This device's part of the row as a map of the state that enters its first document."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    to_end = _decay_to_end(decay.astype(dtype), segments, k.shape[1])
    keep, write = jnp.exp(to_end[:, 0]), jnp.exp(to_end[:, 1:])
    if segments is not None:
        first, last = end_documents(segments)
        writes = (segments == last[:, None]) & (segments != 0)
        write = jnp.where(writes[..., None], write, 0)
        keep = jnp.where((first == last)[:, None], keep, 0)
    written = k.astype(dtype) * write[..., None]
    update = jnp.einsum("bthk,bthv->bhkv", written, v.astype(dtype))
    return AffineMap(jnp.broadcast_to(keep, update.shape[:2])[..., None, None], update)


def _decay_to_end(decay, segments, T):
    """Decay by the tokens from each on, and by none: [B, T + 1, H], B = 1 if rows do not differ.

    Summed from the end: a difference of sums from the beginning is noise in a long part.
    """

    def sums(x):
        return jnp.pad(jax.lax.cumsum(x, axis=1, reverse=True), ((0, 0), (0, 1), (0, 0)))

    real = None if segments is None else (segments != 0)[..., None]
    if decay.ndim == 3:
        return sums(decay if real is None else jnp.where(real, decay, 0))
    if real is None:
        return decay * jnp.arange(T, -1, -1)[None, :, None]
    return decay * sums(real.astype(jnp.int32))
