"""Shapes of chunk-sparse attention in published models, by which kernels are compiled and timed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """Heads of one layer, their width, slots and chunk size, and tokens of a training row."""

    H: int
    G: int
    K: int
    J: int
    chunk_size: int
    T: int

    def arrays(self, B: int, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        array = jax.ShapeDtypeStruct
        keys = array((B, self.T // self.chunk_size * self.chunk_size, self.G, self.K), dtype)
        slots = B, self.T, self.G, self.J
        return dict(q=array((B, self.T, self.H, self.K), dtype), k=keys, v=keys,
                    indices=array(slots, jnp.int32), weights=array(slots, jnp.float32))


SHAPES = {
    # The ablations of https://arxiv.org/abs/2510.17196; its heads are not published.
    "hsa-240m": Shape(H=16, G=1, K=64, J=8, chunk_size=64, T=4096),
    "hsa-345m": Shape(H=16, G=1, K=64, J=32, chunk_size=64, T=8192),
    "hsa-bench": Shape(H=16, G=1, K=64, J=8, chunk_size=64, T=65536),  # the authors' benchmark
    "tiny": Shape(H=4, G=1, K=32, J=4, chunk_size=16, T=512),  # this repository's smallest
}
