"""Attention over chosen chunks on any device, over tiles of queries.

With p the softmax of a (query, slot) pair's logits, w its weight, `dp = do v^T` and `d` the mean
`sum p dp` over what the softmax runs over:

    dw = sum over heads of d      ds = w p (dp - d)      dq = scale ds k
    dk = scale ds^T q             dv = (w p)^T do

dq and dw are sums over a query's slots, taken as in the forward pass; dk and dv are sums over a
chunk's queries, taken chunk by chunk. Logits are computed again, nothing is kept.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.xla import alike
from pallas_kernels.chunk_sparse_attention.dense import attend_all
from pallas_kernels.chunk_sparse_attention.gathered import (
    attend_chunks,
    dot,
    grouped,
    logits_of,
    softmax,
)
from pallas_kernels.precision import exact_products
from pallas_kernels.selection import in_tiles, rows_of, sum_over_queries, tile_size

_FEW = 4  # chunks per slot, up to which attention over all of them is faster


def chunk_sparse_attention(q, k, v, indices, weights, index, *, chunk_size, scale, off_by_one):
    if k.shape[1] == 0:
        return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    N, T = k.shape[1] // chunk_size, q.shape[1]
    if N <= min(_FEW * indices.shape[-1], T):
        return attend_all(q, k, v, indices, weights, index, chunk_size=chunk_size, scale=scale,
                          off_by_one=off_by_one)
    return _attend(chunk_size, scale, off_by_one, q, k, v, indices, weights, index)


def joint_softmax(q, k, v, indices, index, *, chunk_size, scale):
    """One softmax over the keys of all chosen chunks, in f32, and the logarithms of its
    denominators `[B, T, H, 1]`, -inf where nothing is seen; differentiated by JAX."""
    chunks = _chunks(k, chunk_size), _chunks(v, chunk_size)

    def tile(q, indices, index):
        k, v = _fetch(chunks, indices)
        logits = logits_of(grouped(q, k.shape[2]), k, indices, index, scale)
        p, logsumexp = softmax(logits, off_by_one=False, axes=(-2, -1))
        o = dot("btgrjc,btgjcv->btgrv", p.astype(v.dtype), v)
        heads = lambda x: x.reshape(*q.shape[:3], -1)
        return heads(o), heads(jnp.where(logsumexp == jnp.inf, -jnp.inf, logsumexp))

    return in_tiles(tile, _tile_size(k, indices, chunk_size), q, indices, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(chunk_size, scale, off_by_one, q, k, v, indices, weights, index):
    chunks = _chunks(k, chunk_size), _chunks(v, chunk_size)

    def tile(q, indices, weights, index):
        return attend_chunks(q, *_fetch(chunks, indices), indices, weights, index, scale=scale,
                             off_by_one=off_by_one)

    return in_tiles(tile, _tile_size(k, indices, chunk_size), q, indices, weights, index)


def _attend_forward(chunk_size, scale, off_by_one, *arrays):
    return _attend(chunk_size, scale, off_by_one, *arrays), arrays


def _attend_backward(chunk_size, scale, off_by_one, arrays, do):
    q, k, v, *_ = arrays
    dq, dweights, statistics = _by_query(chunk_size, scale, off_by_one, *arrays, do)
    dk, dv = _by_chunk(chunk_size, scale, off_by_one, *arrays, do, statistics)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dweights, None


_attend.defvjp(_attend_forward, exact_products(_attend_backward))


def _chunks(x, C):
    """[B, N C, G, K] -> [B, N, G, C, K]: a chunk's keys side by side."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 2, 3)


def _fetch(chunks, indices):
    """The chunks in the slots: [B, T, G, J, C, K]."""
    at = jnp.moveaxis(jnp.maximum(indices, 0), 2, 1)
    return (jnp.moveaxis(rows_of(x, at), 1, 2) for x in chunks)


def _tile_size(k, indices, chunk_size):
    B, _, G, J = indices.shape
    return tile_size() // (B * G * J * chunk_size * k.shape[-1])


def _by_query(chunk_size, scale, off_by_one, q, k, v, indices, weights, index, do):
    """dq, dw, and of a softmax over several chunks the logsumexp and d of each query and head."""
    chunks, joint = (_chunks(k, chunk_size), _chunks(v, chunk_size)), weights is None

    def tile(q, indices, weights, index, do):
        k, v = _fetch(chunks, indices)
        G = k.shape[2]
        logits = logits_of(grouped(q, G), k, indices, index, scale)
        axes = (-2, -1) if joint else -1
        p, logsumexp = softmax(logits, off_by_one, axes)
        dp = dot("btgrv,btgjcv->btgrjc", grouped(do, G), v)
        d = (p * dp).sum(axes, keepdims=True)
        ds = p * (dp - d)
        dweights = None
        if not joint:
            dweights = d.sum((3, 5)).astype(weights.dtype)
            ds *= weights[:, :, :, None, :, None]
        dq = scale * dot("btgrjc,btgjck->btgrk", ds.astype(k.dtype), k)
        return dq.reshape(q.shape), dweights, (logsumexp[..., 0, 0], d[..., 0, 0]) if joint else ()

    return in_tiles(tile, _tile_size(k, indices, chunk_size), q, indices, weights, index, do)


def _by_chunk(chunk_size, scale, off_by_one, q, k, v, indices, weights, index, do, statistics):
    """dk and dv."""
    (B, S, G, K), V, J = k.shape, v.shape[-1], indices.shape[-1]
    N, C = S // chunk_size, chunk_size
    q, do, (k, v) = grouped(q, G), grouped(do, G), (_chunks(x, C) for x in (k, v))
    if weights is not None:
        weights = jnp.swapaxes(weights, 2, 3).reshape(B, -1, G)
    if index is not None:
        index = jnp.broadcast_to(index[..., None], (*index.shape, G))

    def of_pairs(pairs, real, chunks):
        q_p, do_p, *joint = (rows_of(x, pairs // J) for x in (q, do, *statistics))
        logits = scale * dot("bgwprk,bwgck->bgwprc", q_p, k[:, chunks])
        if index is not None:
            place = chunks[:, None, None] * C + np.arange(C)
            seen = place <= rows_of(index, pairs // J)[..., None]
            logits = jnp.where(seen[..., None, :], logits, -jnp.inf)
        dp = dot("bgwprv,bwgcv->bgwprc", do_p, v[:, chunks])
        if joint:
            logsumexp, d = (x[..., None] for x in joint)
            p, weight = jnp.exp(logits - logsumexp), 1
        else:
            p, _ = softmax(logits, off_by_one, axes=-1)
            d, weight = (p * dp).sum(-1, keepdims=True), rows_of(weights, pairs)[..., None, None]
        p = jnp.where(real[..., None, None], weight * p, 0)
        ds = scale * p * (dp - d)
        return (dot("bgwprc,bgwprk->bgwck", ds.astype(q.dtype), q_p),
                dot("bgwprc,bgwprv->bgwcv", p.astype(do.dtype), do_p))

    dtype = jnp.promote_types(v.dtype, jnp.float32)
    zeros = lambda *shape: alike(jnp.zeros(shape, dtype), (q, k, v, indices, weights, do))
    start = lambda W: (zeros(B, G, W, C, K), zeros(B, G, W, C, V))
    step = tile_size() // (q.shape[3] * max(K, V, C))
    sums = sum_over_queries(of_pairs, start, indices, N, step)
    return (jnp.moveaxis(x, 1, 3).reshape(B, S, G, -1) for x in sums)
