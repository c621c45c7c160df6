"""The gradient of the chosen scores, whichever way they were chosen.

With `ds` that of `s = scale q . landmark`: `dq = scale sum ds landmark` over the query's slots, and
`dlandmark = scale sum ds q` over the queries that chose the chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.attention.xla import alike
from pallas_kernels.selection import in_tiles, rows_of, sum_over_queries

_TILE = 2**18  # numbers gathered at a time


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
    return _dq(ds, indices, landmarks).astype(q.dtype), _dlandmarks(
        ds, indices, q, landmarks.shape[1]).astype(landmarks.dtype), None


with_gradient.defvjp(_forward, _backward)


def _dq(ds, indices, landmarks):
    B, T, G, J = ds.shape
    if landmarks.shape[1] == 0:
        return jnp.zeros((B, T, G, landmarks.shape[-1]), ds.dtype)

    def tile(ds, indices):
        chosen = rows_of(landmarks, jnp.moveaxis(jnp.maximum(indices, 0), 2, 1))
        return jnp.einsum("btgj,bgtjr->btgr", ds, chosen.astype(ds.dtype))

    return in_tiles(tile, _TILE // (B * G * J * landmarks.shape[-1]), ds, indices)


def _dlandmarks(ds, indices, q, N):
    B, T, G, J = ds.shape
    R = q.shape[-1]
    if N == 0:
        return jnp.zeros((B, N, G, R), ds.dtype)
    ds_of_pair = jnp.moveaxis(ds, 3, 2).reshape(B, T * J, G)

    def of_pairs(pairs, real, _):
        weight = jnp.where(real, rows_of(ds_of_pair, pairs), 0)
        queries = rows_of(q, pairs // J).astype(ds.dtype)
        return jnp.einsum("bgwp,bgwpr->bgwr", weight, queries)

    start = lambda W: alike(jnp.zeros((B, G, W, R), ds.dtype), (ds, indices, q))
    return jnp.moveaxis(sum_over_queries(of_pairs, start, indices, N, _TILE // R), 1, 2)
