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
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import target_platform
from pallas_kernels.precision import exact_products

_LARGEST_DIRECT = 64 * 64  # T * S up to which all logits are formed
_CPU_BLOCKS = (64, 256)  # least and most: logits stay in cache, and few are computed in vain
_BLOCK = 512  # elsewhere fewer, larger steps
NEVER = np.iinfo(np.int32).max  # index of a key that no query reaches


class Places(NamedTuple):
    """Where tokens stand; B is 1 where rows do not differ."""

    index: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None


def attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index, window):
    T, S = q.shape[1], k.shape[1]
    q_at = Places(np.arange(T)[None] if q_index is None else q_index, q_segments)
    k_at = Places(np.arange(S)[None] if k_index is None else k_index, k_segments)
    if _is_small(T, S):
        return forward(q, k, v, q_at, k_at, window, scale)[0].astype(v.dtype)
    q, k, v = alike((q, k, v), (q_at, k_at, window))
    return _flash(q, k, v, q_at, k_at, window, scale)


def _is_small(T, S):
    return T == 1 or T * S <= _LARGEST_DIRECT


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q, k, v, q_at, k_at, window, scale):
    return _flash_forward(q, k, v, q_at, k_at, window, scale)[0]


def _flash_forward(q, k, v, q_at, k_at, window, scale):
    o, logsumexp = forward(q, k, v, q_at, k_at, window, scale)
    o = o.astype(v.dtype)
    return o, (q, k, v, q_at, k_at, window, o, logsumexp)


def _flash_backward(scale, residuals, do):
    q, k, v, q_at, k_at, window, o, logsumexp = residuals
    delta = _dot("bthv,bthv->bth", o, do)
    gradients = backward(q, k, v, q_at, k_at, window, scale, logsumexp, delta, do)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None, None, None


_flash.defvjp(_flash_forward, exact_products(_flash_backward))


def forward(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G V"],
    q_at: Places, k_at: Places, window: int | Int[Array, ""] | None, scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Outputs and the logsumexp of the logits, both in f32: 0 and -inf where no key is seen."""
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    form = _direct if _is_small(T, S) else _blockwise
    o, logsumexp = form(q.reshape(B, T, G, H // G, -1), k, v, q_at, k_at, window, scale)
    return o.reshape(B, T, H, -1), logsumexp.reshape(B, T, H)


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
    logits = scale * _dot("btgrk,bsgk->bgrts", q, k)
    logits = jnp.where(_visible(q_at, k_at, window), logits, -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - base(largest))
    total = weights.sum(-1, keepdims=True)
    o = _dot("bgrts,bsgv->bgrtv", weights.astype(v.dtype), v) / nonzero(total)
    return tuple(jnp.moveaxis(x, 3, 1) for x in (o, largest + jnp.log(nonzero(total))))


def _blockwise(q, k, v, q_at, k_at, window, scale):
    T, S = q.shape[1], k.shape[1]
    bq, bk = _block_sizes(T, S)
    q, k, v = _blocks(q, bq), _blocks(k, bk), _blocks(v, bk)
    q_at, k_at = _padded_places(q_at, bq, k_at, bk)
    k_extent = _extents(k_at, bk)

    def query_block(i):
        q_i, q_at_i = _block(q, i, bq), _places(q_at, i, bq)

        def key_block(j, carry):
            o, total, largest = carry
            logits = _logits(q_i, _block(k, j, bk), q_at_i, _places(k_at, j, bk), window, scale)
            new = jnp.maximum(largest, logits.max(-1, keepdims=True))
            p, shrink = jnp.exp(logits - base(new)), jnp.exp(largest - base(new))
            pv = _dot("bgrts,bgsv->bgrtv", p.astype(v.dtype), _block(v, j, bk))
            return shrink * o + pv, shrink * total + p.sum(-1, keepdims=True), new

        rows, dtype = q_i.shape[:-1], jnp.promote_types(v.dtype, jnp.float32)
        start = (jnp.zeros((*rows, v.shape[-1]), dtype), jnp.zeros((*rows, 1), dtype),
                 jnp.full((*rows, 1), -jnp.inf, dtype))
        first, end = _seen(_extents(q_at_i, bq), k_extent, window)
        o, total, largest = jax.lax.fori_loop(
            first, end, key_block, alike(start, (q, k, v, q_at, k_at, window)))
        return o / nonzero(total), largest + jnp.log(nonzero(total))

    blocks = jax.lax.map(query_block, np.arange(q.shape[3] // bq))
    return tuple(_tokens(_unblock(x), T) for x in blocks)


def backward(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G V"],
    q_at: Places, k_at: Places, window: int | Int[Array, ""] | None, scale: float,
    logsumexp: Float[Array, "B T H"], delta: Float[Array, "B T H"], do: Float[Array, "B T H V"],
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G V"]]:
    """What these keys add to dq, and their dk and dv, in f32.

    `logsumexp` and `delta = sum(o do)` are those of all keys that the queries see, of which these
    may be a part.
    """
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    bq, bk = _block_sizes(T, S)
    grouped = lambda x: _blocks(x.reshape(B, T, G, H // G, -1), bq)
    # +inf makes the weights of a query that sees nothing 0.
    logsumexp = grouped(jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp))
    q, do, delta = grouped(q), grouped(do), grouped(delta)
    k, v = _blocks(k, bk), _blocks(v, bk)
    q_at, k_at = _padded_places(q_at, bq, k_at, bk)
    q_extent = _extents(q_at, bq)

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
        return dq, (dk_j, dv_j)

    dtype = jnp.promote_types(v.dtype, jnp.float32)
    zeros = lambda shape: alike(jnp.zeros(shape, dtype), (q, k, v, q_at, k_at, window, do))
    dq, blocks = jax.lax.scan(key_block, zeros(q.shape), np.arange(k.shape[2] // bk))
    dk, dv = map(_unblock, blocks)
    return _tokens(dq, T).reshape(B, T, H, -1), _tokens(dk, S), _tokens(dv, S)


def _block_sizes(T, S):
    block = min(max(S // 64 * 8, _CPU_BLOCKS[0]), _CPU_BLOCKS[1])
    block = block if target_platform() == "cpu" else _BLOCK
    return tuple(min(block, math.ceil(n / 8) * 8) for n in (T, S))


def _blocks(x, size):
    """[B, T, ..., K] -> [B, ..., T, K] with T filled up to whole blocks."""
    x = jnp.moveaxis(x, 1, -2)
    return _pad(x, x.ndim - 2, size)


def _tokens(x, T):
    """Its inverse."""
    return jnp.moveaxis(x, -2, 1)[:, :T]


def _padded_places(q_at: Places, bq, k_at: Places, bk):
    """Padded queries repeat the last one and are cut off; padded keys are out of reach."""
    return (jax.tree.map(lambda x: _pad(x, 1, bq, mode="edge"), q_at),
            jax.tree.map(lambda x: _pad(x, 1, bk, constant_values=NEVER), k_at))


def _pad(x, axis, block, **how):
    amount = [(0, 0)] * x.ndim
    amount[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, amount, **how)


def _dot(subscripts, x, y):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)


def _logits(q, k, q_at, k_at, window, scale):
    logits = scale * _dot("bgrtk,bgsk->bgrts", q, k)
    return jnp.where(_visible(q_at, k_at, window), logits, -jnp.inf)


def base(largest):
    """The logit that exponents are taken against, finite also where no key is seen."""
    return jnp.where(largest == -jnp.inf, 0, largest)


def nonzero(total):
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
        lowest = jnp.where(segments == 0, NEVER, segments).min(-1)
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


def manual_axes(tree):
    """Axes of the enclosing shard_map over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))


def alike(tree, others):
    """The arrays marked as varying over all axes over which they or the others vary, as a loop
    over such arrays needs its carry."""
    axes = manual_axes((tree, others))
    mark = lambda x: jax.lax.pcast(x, tuple(axes - manual_axes(x)), to="varying")
    return jax.tree.map(mark, tree)
