"""Shapes of retrieval in published models, by which kernels are compiled and timed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """Groups of one layer, their width, slots and chunk size, and tokens of a training row."""

    G: int
    R: int
    k: int
    chunk_size: int
    T: int

    def arrays(self, B: int, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        array = lambda length: jax.ShapeDtypeStruct((B, length, self.G, self.R), dtype)
        return dict(q=array(self.T), landmarks=array(self.T // self.chunk_size))


SHAPES = {
    # The ablations of https://arxiv.org/abs/2510.17196; its width is not published.
    "hsa-240m": Shape(G=1, R=768, k=8, chunk_size=64, T=4096),
    "hsa-345m": Shape(G=1, R=1024, k=32, chunk_size=64, T=8192),
    "hsa-bench": Shape(G=1, R=64, k=8, chunk_size=64, T=65536),  # the authors' speed benchmark
    "tiny": Shape(G=1, R=32, k=4, chunk_size=16, T=512),  # this repository's smallest
}
