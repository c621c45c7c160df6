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

from pallas_kernels.dispatch import target_platform

Sums = TypeVar("Sums")  # a pytree of arrays [B, G, W, ...]

_PAIRS = 64  # of a chunk, per step
_CPU_TILE = 2**18  # numbers at a time: they stay in cache
_TILE = 2**24  # elsewhere fewer, larger steps


def pairs_by_chunk(
    indices: Int[Array, "B T G J"], N: int
) -> tuple[Int[Array, "B G TJ"], Int[Array, "B G N1"]]:
    """The pairs sorted by chunk, empty slots last, and where each chunk's begin (N + 1 places)."""
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




def tile_size() -> int:
    """How many numbers to work on at a time."""
    return _CPU_TILE if target_platform() == "cpu" else _TILE


def in_tiles(f: Callable, size: int, *arrays: Array | None):
    """`f` of arrays [B, T, ...], over tiles of at most `size` tokens, one after the other."""
    T = next(x.shape[1] for x in arrays if x is not None)
    if T <= max(size, 1):
        return f(*arrays)
    results = jax.lax.map(lambda tile: f(*tile), cut(arrays, size))
    return jax.tree.map(lambda x: joined(x, T), results)


def cut(arrays, size: int):
    """Arrays [B, T, ...] as tiles [tiles, B, size or less, ...], filled up with zeros."""

    def cut(x):
        tiles = math.ceil(x.shape[1] / max(size, 1))
        tile = math.ceil(x.shape[1] / tiles)
        x = jnp.pad(x, ((0, 0), (0, tiles * tile - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], tiles, tile, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def joined(x: Array, T: int) -> Array:
    """Its inverse."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]
