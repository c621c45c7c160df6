"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridjax.sharding import place


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis, in f32 (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, *, eps: float = 1e-6, axis: str | None = None):
        """`axis`: the logical axis of `x`'s last dimension where that is sharded."""
        self.eps, self.axis = eps, axis
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * place(self.scale[...], self.axis)).astype(x.dtype)
