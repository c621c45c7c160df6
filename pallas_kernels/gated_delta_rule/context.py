"""The gated delta rule of rows that are split along a mesh axis, a contiguous part on each device.

To the state that enters it, a part of a row is an affine map: each token's

    S -> exp(decay) (I - beta k k^T) S + beta k v^T

is one, and so are compositions, `S_out = M S_in + U`. M is 0 if a document ends in the part or at
its beginning, and padding is the identity. A scan of the maps over the devices gives the state
that enters each part; it moves O(B H K (K + V)) numbers however long the rows are. The op then
runs once, from that state. The gradient is the transposed scan.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.context import document_continues, on_split_row
from pallas_kernels.gated_delta_rule import xla

_product = functools.partial(jnp.matmul, precision="highest")


class AffineMap(NamedTuple):
    """`S -> transition S + update`."""

    transition: Float[Array, "B H K K"]
    update: Float[Array, "B H K V"]

    def __call__(self, state: Float[Array, "B H K V"] | None) -> Float[Array, "B H K V"]:
        return self.update if state is None else _product(self.transition, state) + self.update

    def then(self, later: "AffineMap") -> "AffineMap":
        return AffineMap(_product(later.transition, self.transition), later(self.update))


def split_gated_delta_rule(
    op: Callable, axis: str, q, k, v, beta, decay, *, initial_state, segments, output_final_state
):
    """`op`, the gated delta rule of a whole row, on this device's part of it.

    `initial_state` and the final state are those of the row, the same on every device.
    """
    part = AffineMap(*xla.affine_map(k, v, beta, decay, segments))
    continues = None
    if segments is not None:
        continues = document_continues(segments, axis)
        transition = jnp.where(continues[:, None, None, None], part.transition, 0)
        part = part._replace(transition=transition)
    eye = jnp.eye(k.shape[-1], dtype=part.transition.dtype)
    identity = AffineMap(jnp.broadcast_to(eye, part.transition.shape), jnp.zeros_like(part.update))
    op = functools.partial(op, q, k, v, beta, decay, segments=segments)
    return on_split_row(op, part, identity, continues, axis, initial_state, output_final_state)
