"""Attention on any device, with every argument.

Block by block with a running softmax and a hand-written backward pass (FlashAttention-2,
https://arxiv.org/abs/2307.08691, algorithms 1 and 2); blocks that see nothing are not computed.
Single queries and the smallest problems form all their logits and are differentiated by JAX.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.dispatch import target_platform

_LARGEST_DIRECT = 64 * 64  # T * S up to which all logits are formed
_CPU_BLOCKS = (64, 256)  # least and most: logits stay in cache, and few are computed in vain
_BLOCK = 512  # elsewhere fewer, larger steps
_NEVER = np.iinfo(np.int32).max  # index of a key that no query reaches


class Places(NamedTuple):
    """Where tokens stand; B is 1 where rows do not differ."""

    index: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None


def attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index, window):
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    q_at = Places(np.arange(T)[None] if q_index is None else q_index, q_segments)
    k_at = Places(np.arange(S)[None] if k_index is None else k_index, k_segments)
    q = q.reshape(B, T, G, H // G, K)
    if T == 1 or T * S <= _LARGEST_DIRECT:
        o = _direct(q, k, v, q_at, k_at, window, scale)
    else:
        o = _blockwise(q, k, v, q_at, k_at, window, scale)
    return o.reshape(B, T, H, -1)


def _visible(q_at, k_at, window):
    """Which keys the queries see, broadcastable to [B, G, R, T, S]."""
    q_index, k_index = q_at.index[:, None, None, :, None], k_at.index[:, None, None, None, :]
    visible = k_index <= q_index
    if window is not None:
        visible = visible & (q_index - k_index < window)
    if q_at.segments is not None:
        q_segments = q_at.segments[:, None, None, :, None]
        visible = visible & (q_segments == k_at.segments[:, None, None, None, :])
        visible = visible & (q_segments != 0)
    return visible


def _direct(q, k, v, q_at, k_at, window, scale):
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    logits = scale * jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=dtype)
    logits = jnp.where(_visible(q_at, k_at, window), logits, -jnp.inf)
    weights = jnp.exp(logits - _base(jax.lax.stop_gradient(logits.max(-1, keepdims=True))))
    o = jnp.einsum("bgrts,bsgv->bgrtv", weights.astype(v.dtype), v, preferred_element_type=dtype)
    o /= _nonzero(weights.sum(-1, keepdims=True))
    return jnp.moveaxis(o, 3, 1).astype(v.dtype)


def _blockwise(q, k, v, q_at, k_at, window, scale):
    """Brings the arrays to whole blocks, heads before tokens, and back."""
    T, S = q.shape[1], k.shape[1]
    block = min(max(S // 64 * 8, _CPU_BLOCKS[0]), _CPU_BLOCKS[1])
    block = block if target_platform() == "cpu" else _BLOCK
    bq, bk = (min(block, math.ceil(n / 8) * 8) for n in (T, S))
    q = _pad(jnp.moveaxis(q, 1, 3), 3, bq)
    k, v = (_pad(jnp.moveaxis(x, 1, 2), 2, bk) for x in (k, v))
    # Padded queries repeat the last one and are cut off; padded keys are out of reach.
    q_at = jax.tree.map(lambda x: _pad(x, 1, bq, mode="edge"), q_at)
    k_at = jax.tree.map(lambda x: _pad(x, 1, bk, constant_values=_NEVER), k_at)
    axes = _manual_axes(q, k, v, q_at, k_at, window)
    q, k, v = (_varying(x, axes) for x in (q, k, v))
    o = _flash(q, k, v, q_at, k_at, window, scale, bq, bk)
    return jnp.moveaxis(o, 3, 1)[:, :T]


def _pad(x, axis, block, **how):
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, amount, **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _flash(q, k, v, q_at, k_at, window, scale, bq, bk):
    """q [B, G, R, T, K], k [B, G, S, K], v [B, G, S, V] -> [B, G, R, T, V]."""
    return _flash_forward(q, k, v, q_at, k_at, window, scale, bq, bk)[0]


def _flash_forward(q, k, v, q_at, k_at, window, scale, bq, bk):
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    k_extent = _extents(k_at, bk)

    def query_block(i):
        q_i, q_at_i = _block(q, i, bq), _places(q_at, i, bq)

        def key_block(j, carry):
            o, total, largest = carry
            logits = _logits(q_i, _block(k, j, bk), q_at_i, _places(k_at, j, bk), window, scale)
            new = jnp.maximum(largest, logits.max(-1, keepdims=True))
            p, shrink = jnp.exp(logits - _base(new)), jnp.exp(largest - _base(new))
            pv = _dot("bgrts,bgsv->bgrtv", p.astype(v.dtype), _block(v, j, bk))
            return shrink * o + pv, shrink * total + p.sum(-1, keepdims=True), new

        rows = q_i.shape[:-1]
        start = (jnp.zeros((*rows, v.shape[-1]), dtype), jnp.zeros((*rows, 1), dtype),
                 jnp.full((*rows, 1), -jnp.inf, dtype))
        start = [_varying(x, _manual_axes(q)) for x in start]
        first, end = _seen(_extents(q_at_i, bq), k_extent, window)
        o, total, largest = jax.lax.fori_loop(first, end, key_block, tuple(start))
        # +inf makes the recomputed weights of a query that sees nothing 0 in the backward pass.
        logsumexp = jnp.where(total == 0, jnp.inf, largest + jnp.log(_nonzero(total)))
        return (o / _nonzero(total)).astype(v.dtype), logsumexp

    blocks = jax.lax.map(query_block, np.arange(q.shape[3] // bq))
    o, logsumexp = map(_unblock, blocks)
    return o, (q, k, v, q_at, k_at, window, o, logsumexp)


def _flash_backward(scale, bq, bk, residuals, do):
    q, k, v, q_at, k_at, window, o, logsumexp = residuals
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q_extent = _extents(q_at, bq)
    delta = _dot("bgrtv,bgrtv->bgrt", o, do)[..., None]

    def key_block(dq, j):
        k_j, v_j, k_at_j = _block(k, j, bk), _block(v, j, bk), _places(k_at, j, bk)

        def query_block(i, carry):
            dq, dk_j, dv_j = carry
            q_i, do_i = _block(q, i, bq), _block(do, i, bq)
            logits = _logits(q_i, k_j, _places(q_at, i, bq), k_at_j, window, scale)
            p = jnp.exp(logits - _block(logsumexp, i, bq))
            dp = _dot("bgrtv,bgsv->bgrts", do_i, v_j)
            ds = (scale * p * (dp - _block(delta, i, bq))).astype(q.dtype)
            dq_i = _block(dq, i, bq) + _dot("bgrts,bgsk->bgrtk", ds, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * bq, axis=3)
            dk_j += _dot("bgrts,bgrtk->bgsk", ds, q_i)
            dv_j += _dot("bgrts,bgrtv->bgsv", p.astype(do.dtype), do_i)
            return dq, dk_j, dv_j

        first, end = _seen(q_extent, _extents(k_at_j, bk), window)
        start = (dq, zeros(k_j.shape), zeros(v_j.shape))
        dq, dk_j, dv_j = jax.lax.fori_loop(first, end, query_block, start)
        return dq, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

    zeros = lambda shape: _varying(jnp.zeros(shape, dtype), _manual_axes(q))
    dq, blocks = jax.lax.scan(key_block, zeros(q.shape), np.arange(k.shape[2] // bk))
    dk, dv = map(_unblock, blocks)
    return dq.astype(q.dtype), dk, dv, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _dot(subscripts, x, y):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)


def _logits(q, k, q_at, k_at, window, scale):
    logits = scale * _dot("bgrtk,bgsk->bgrts", q, k)
    return jnp.where(_visible(q_at, k_at, window), logits, -jnp.inf)


def _base(largest):
    """The logit that exponents are taken against, finite also where no key is seen."""
    return jnp.where(largest == -jnp.inf, 0, largest)


def _nonzero(total):
    return jnp.where(total == 0, 1, total)


def _block(x, i, size):
    """Block i of the tokens of [..., T, K]."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=x.ndim - 2)


def _unblock(x):
    """[N, ..., C, K] -> [..., N C, K]."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _places(at: Places, i, size) -> Places:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1), at)


class Extents(NamedTuple):
    """Least and greatest index and segment of blocks of tokens."""

    index: tuple[Int[Array, "B N"], Int[Array, "B N"]]
    segments: tuple[Int[Array, "B N"], Int[Array, "B N"]] | None


def _extents(at: Places, block) -> Extents:
    index, segments = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, block), at)
    index = index.min(-1), index.max(-1)
    if segments is not None:
        lowest = jnp.where(segments == 0, _NEVER, segments).min(-1)
        segments = lowest, segments.max(-1)
    return Extents(index, segments)


def _seen(q: Extents, k: Extents, window):
    """Range of the blocks that may hold a visible pair in some row; one of q, k is one block."""
    seen = k.index[0] <= q.index[1]
    if window is not None:
        seen = seen & (q.index[0] - k.index[1] < window)
    if q.segments is not None:
        seen = seen & (k.segments[0] <= q.segments[1]) & (q.segments[0] <= k.segments[1])
    seen = seen.any(0)
    return jnp.argmax(seen), jnp.where(seen.any(), seen.size - jnp.argmax(seen[::-1]), 0)


def _manual_axes(*trees):
    """Axes of the enclosing shard_map over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(trees)))


def _varying(x, axes):
    """x marked as varying over the axes, as the carry of a loop over varying arrays must be."""
    return jax.lax.pcast(x, tuple(axes - _manual_axes(x)), to="varying")
