"""Shapes of published models, by which kernels are compiled, tuned and timed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """Heads of queries and keys, heads of values, and their widths; of one layer."""

    heads: int
    value_heads: int
    K: int
    V: int

    def arrays(self, B: int, T: int, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments of the op; beta and decay are f32, as layers compute them."""
        keys = jax.ShapeDtypeStruct((B, T, self.heads, self.K), dtype)
        values = jax.ShapeDtypeStruct((B, T, self.value_heads, self.V), dtype)
        gates = jax.ShapeDtypeStruct((B, T, self.value_heads), jnp.float32)
        return dict(q=keys, k=keys, v=values, beta=gates, decay=gates)


SHAPES = {
    "qwen3-next-80b": Shape(16, 32, 128, 128),  # Qwen3.5-35B-A3B too
    "qwen3.5-397b": Shape(16, 64, 128, 128),
    "jet-nemotron-2b": Shape(12, 12, 96, 256),
    "fla-default": Shape(6, 6, 256, 512),  # of flash-linear-attention's layer, 2048 wide
}
