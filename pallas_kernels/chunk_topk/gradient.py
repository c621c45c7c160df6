"""The gradient of the chosen scores, whichever way they were chosen.

With `ds` that of `s = scale q . landmark`: `dq = scale sum ds landmark` over the query's slots, and
`dlandmark = scale sum ds q` over the queries that chose the chunk. Where chunks are few, both are
products with tiles of a T x N matrix that holds ds; else the landmarks are gathered, and the
queries summed chunk by chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.xla import alike
from pallas_kernels.precision import exact_products
from pallas_kernels.selection import (
    cut,
    in_tiles,
    joined,
    rows_of,
    sum_over_queries,
    tile_size,
)

_FEW = 128  # chunks per slot, up to which products beat gathering


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_gradient(choose: Callable, scale: float, q, landmarks, others):
    """`choose(q, landmarks, *others)`: indices and scores."""
    return choose(q, landmarks, *others)


def _forward(choose, scale, q, landmarks, others):
    indices, scores = choose(q, landmarks, *others)
    return (indices, scores), (q, landmarks, indices)


def _backward(choose, scale, residuals, gradients):
    q, landmarks, indices = residuals
    ds = jnp.where(indices < 0, 0, scale * gradients[1])
    N = landmarks.shape[1]
    if N <= _FEW * indices.shape[-1]:
        dq, dlandmarks = _by_products(ds, indices, q, landmarks)
    else:
        dq, dlandmarks = _dq(ds, indices, landmarks), _dlandmarks(ds, indices, q, N)
    return dq.astype(q.dtype), dlandmarks.astype(landmarks.dtype), None


with_gradient.defvjp(_forward, exact_products(_backward))


def _by_products(ds, indices, q, landmarks):
    (B, T, G, _), N = ds.shape, landmarks.shape[1]
    landmarks = landmarks.astype(ds.dtype)

    def tile(dlandmarks, arrays):
        ds, indices, q = arrays
        of_chunk = indices[..., None] == np.arange(N)
        ds = jnp.where(of_chunk, ds[..., None], 0).sum(3)  # [B, T, G, N]
        dlandmarks += jnp.einsum("btgn,btgr->bngr", ds, q.astype(ds.dtype))
        return dlandmarks, jnp.einsum("btgn,bngr->btgr", ds, landmarks)

    start = alike(jnp.zeros(landmarks.shape, ds.dtype), (ds, indices, q, landmarks))
    tiles = cut((ds, indices, q), tile_size() // max(B * G * N, 1))
    dlandmarks, dq = jax.lax.scan(tile, start, tiles)
    return joined(dq, T), dlandmarks


def _dq(ds, indices, landmarks):
    B, T, G, J = ds.shape

    def tile(ds, indices):
        chosen = rows_of(landmarks, jnp.moveaxis(jnp.maximum(indices, 0), 2, 1))
        return jnp.einsum("btgj,bgtjr->btgr", ds, chosen.astype(ds.dtype))

    return in_tiles(tile, tile_size() // (B * G * J * landmarks.shape[-1]), ds, indices)


def _dlandmarks(ds, indices, q, N):
    B, T, G, J = ds.shape
    R = q.shape[-1]
    ds_of_pair = jnp.moveaxis(ds, 3, 2).reshape(B, T * J, G)

    def of_pairs(pairs, real, _):
        weight = jnp.where(real, rows_of(ds_of_pair, pairs), 0)
        queries = rows_of(q, pairs // J).astype(ds.dtype)
        return jnp.einsum("bgwp,bgwpr->bgwr", weight, queries)

    start = lambda W: alike(jnp.zeros((B, G, W, R), ds.dtype), (ds, indices, q))
    sums = sum_over_queries(of_pairs, start, indices, N, tile_size() // R)
    return jnp.moveaxis(sums, 1, 2)
