"""A selection read from the side of the chunks: which queries chose each, for gradients.

A pair is one slot of one query that holds a chunk, numbered `t * J + j`. Sorted by chunk, the pairs
give sums over a chunk's queries without atomics and without a T x N array.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.xla import alike

Sums = TypeVar("Sums")  # a pytree of arrays [B, G, W, ...]

_PAIRS = 64  # of a chunk, per step


def pairs_by_chunk(
    indices: Int[Array, "B T G J"], N: int
) -> tuple[Int[Array, "B G TJ"], Int[Array, "B G N1"]]:
    """The pairs sorted by chunk, empty slots last, and where each chunk's begin and the last end."""
    B, T, G, J = indices.shape
    chunk = jnp.moveaxis(indices, 2, 1).reshape(B, G, T * J)
    chunk = jnp.where(chunk < 0, N, chunk)
    pair = jnp.broadcast_to(jnp.arange(T * J, dtype=jnp.int32), chunk.shape)
    chunk, pair = jax.lax.sort((chunk, pair), num_keys=1)
    search = lambda row: jnp.searchsorted(row, jnp.arange(N + 1), method="sort")
    return pair, jax.vmap(jax.vmap(search))(chunk)


def sum_over_queries(
    f: Callable[[Int[Array, "B G W P"], Bool[Array, "B G W P"], Int[Array, " W"]], Sums],
    start: Callable[[int], Sums],
    indices: Int[Array, "B T G J"],
    N: int,
    size: int,
) -> Sums:
    """For every chunk the sum of `f` over the pairs that hold it: arrays [B, G, N, ...].

    Args:
      f: takes pairs of each of W chunks, which of them are real, and the chunks; sums over P.
      start: zeros for W chunks.
      size: pairs at a time, over all rows, groups and chunks.
    """
    B, T, G, J = indices.shape
    pair, first = pairs_by_chunk(indices, N)
    P = min(_PAIRS, T * J)
    W = max(1, min(N, size // (B * G * P)))

    def some_chunks(chunks):
        begin, end = first[..., chunks], first[..., chunks + 1]

        def step(i, sums):
            place = begin[..., None] + i * P + np.arange(P)
            real = place < end[..., None]
            place = jnp.minimum(place, T * J - 1).reshape(B, G, W * P)
            pairs = jnp.take_along_axis(pair, place, axis=2).reshape(B, G, W, P)
            return jax.tree.map(jnp.add, sums, f(pairs, real, chunks))

        steps = -(-(end - begin).max() // P)
        return jax.lax.fori_loop(0, steps, step, start(W))

    tiles = math.ceil(N / W)
    chunks = np.minimum(np.arange(tiles * W), N - 1).reshape(tiles, W)  # the last ones again
    sums = jax.lax.map(some_chunks, chunks)
    whole = lambda x: jnp.moveaxis(x, 0, 2).reshape(B, G, tiles * W, *x.shape[4:])[:, :, :N]
    return jax.tree.map(whole, sums)


def rows_of(x: Array, index: Int[Array, "B G ..."]) -> Array:
    """`x[b, index[b, g, ...], g]` of x [B, S, G, ...]."""
    pick = lambda rows, at: rows[at]
    return jax.vmap(jax.vmap(pick, in_axes=(1, 0)))(x, index)




def in_tiles(f: Callable, size: int, *arrays: Array | None):
    """`f` of arrays [B, T, ...], over tiles of at most `size` tokens, one after the other."""
    T = next(x.shape[1] for x in arrays if x is not None)
    tiles = math.ceil(T / max(size, 1))
    if tiles <= 1:
        return f(*arrays)
    size = math.ceil(T / tiles)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, tiles * size - T), *[(0, 0)] * (x.ndim - 2)), mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], tiles, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], tiles * size, *x.shape[3:])[:, :T]

    return jax.tree.map(join, jax.lax.map(lambda tile: f(*tile), jax.tree.map(cut, arrays)))
