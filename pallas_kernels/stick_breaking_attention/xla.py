"""Stick-breaking attention on any device: tiles of queries against blocks of keys, newest first.

What a block's keys leave of the stick, in log space, is all that the next older block needs. With
`p` the weights, `dp = do v^T` and `g = p dp`, the logit z of a key has the gradient

    dz = g - sigmoid(z) (sum of g over this key and those before it)

where that sum is `o do` less the sum over the keys after it: so the backward pass goes through the
blocks in the same order, and computes the weights again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.xla import alike
from pallas_kernels.dispatch import target_platform
from pallas_kernels.precision import exact_products
from pallas_kernels.selection import cut, joined

_CPU_BLOCK, _BLOCK = 128, 512  # queries and keys


class Tokens(NamedTuple):
    """Some tokens, with a leading axis of tiles where there are several."""

    index: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 0 = padding


def stick_breaking_attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index):
    return _attend(scale, q, k, v, Tokens(q_index, q_segments), Tokens(k_index, k_segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, q_at, k_at):
    return forward(scale, q, k, v, q_at, k_at)[0].astype(v.dtype)


def _attend_forward(scale, q, k, v, q_at, k_at):
    o = _attend(scale, q, k, v, q_at, k_at)
    return o, (q, k, v, q_at, k_at, o)


def forward(
    scale: float, q: Float[Array, "B T H K"], k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"], q_at: Tokens, k_at: Tokens,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Outputs, and the logarithm of what is left of the stick after all keys, both in f32."""
    (B, T, H, _), V, G = q.shape, v.shape[-1], k.shape[2]
    queries, keys = _block_sizes(T, k.shape[1])
    k, v, k_at = cut((k, v, k_at), keys)

    def tile(tile):
        q, q_at = tile

        def block(i, carry):
            o, left = carry
            k_i, v_i, k_at_i = _block((k, v, k_at), i)
            p, left = _broken(*_logits(scale, q, k_i, q_at, k_at_i), left)
            return o + _dot("bgrts,bsgv->bgrtv", p.astype(v_i.dtype), v_i), left

        rows, dtype = (B, G, H // G, q.shape[1]), _wide(v)
        start = jnp.zeros((*rows, V), dtype), jnp.zeros((*rows, 1), dtype)
        return _newest_first(block, q_at, k_at, alike(start, (q, k, v, q_at, k_at)))

    o, left = jax.lax.map(tile, cut((q, q_at), queries))
    heads = lambda x: joined(_by_token(x), T)
    return heads(o), heads(left)[..., 0]


def _attend_backward(scale, residuals, do):
    q, k, v, q_at, k_at, o = residuals
    (_, T, _, K), (S, G) = q.shape, k.shape[1:3]
    queries, keys = _block_sizes(T, S)
    delta = jnp.sum(o.astype(_wide(v)) * do, axis=-1, keepdims=True)
    k, v, k_at = cut((k, v, k_at), keys)

    def tile(gradients, tile):
        q, q_at, do, delta = tile
        do, delta = _by_head(do, G), _by_head(delta, G)

        def block(i, carry):
            left, newer, dq, dk, dv = carry
            k_i, v_i, k_at_i = _block((k, v, k_at), i)
            z, visible = _logits(scale, q, k_i, q_at, k_at_i)
            p, left = _broken(z, visible, left)
            g = p * _dot("bgrtv,bsgv->bgrts", do, v_i)
            total, after = _sums_from_the_end(g)
            dz = g - jax.nn.sigmoid(z) * (delta - newer - after)
            dz = jnp.where(visible, scale * dz, 0).astype(q.dtype)
            dq += _dot("bgrts,bsgk->bgrtk", dz, k_i)
            dk = dk.at[i].add(_dot("bgrts,bgrtk->bsgk", dz, _by_head(q, G)))
            dv = dv.at[i].add(_dot("bgrts,bgrtv->bsgv", p.astype(do.dtype), do))
            return left, newer + total, dq, dk, dv

        one = jnp.zeros_like(delta)
        start = one, one, jnp.zeros((*one.shape[:-1], K), one.dtype), *gradients
        _, _, dq, *gradients = _newest_first(block, q_at, k_at, start)
        return tuple(gradients), _by_token(dq)

    zeros = lambda x: alike(jnp.zeros(x.shape, _wide(v)), (q, k, v, q_at, k_at, do))
    tiles = cut((q, q_at, do, delta), queries)
    (dk, dv), dq = jax.lax.scan(tile, (zeros(k), zeros(v)), tiles)
    home = lambda x, tokens, like: joined(x, tokens).astype(like.dtype)
    return home(dq, T, q), home(dk, S, k), home(dv, S, v), None, None


_attend.defvjp(_attend_forward, exact_products(_attend_backward))


def _logits(
    scale: float, q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], q_at: Tokens, k_at: Tokens
) -> tuple[Float[Array, "B G R T S"], Bool[Array, "B 1 1 T S"]]:
    visible = k_at.index[:, None] < q_at.index[..., None]
    visible &= q_at.segments[..., None] == k_at.segments[:, None]
    visible &= (q_at.segments != 0)[..., None]
    logits = scale * _dot("bgrtk,bsgk->bgrts", _by_head(q, k.shape[2]), k)
    return logits, visible[:, None, None]


def _broken(z, visible, left):
    """The keys' weights, given the logarithm of what is left to them, and of what they leave."""
    kept = jnp.where(visible, jax.nn.log_sigmoid(-z), 0)
    total, after = _sums_from_the_end(kept)
    p = jnp.exp(jnp.where(visible, z + kept + after + left, -jnp.inf))
    return p, left + total


def _sums_from_the_end(x):
    """The sum over the last axis, and for each place the sum over those after it."""
    sums = jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)
    after = jnp.concatenate([sums[..., 1:], jnp.zeros_like(sums[..., :1])], axis=-1)
    return sums[..., :1], after


def _newest_first(block, q_at, k_at, start):
    """`block(i, carry)` over the blocks of keys of which a query of the tile may see some."""
    seen = (k_at.index.min(-1) < q_at.index.max(-1)).any(-1)
    end = jnp.max(jnp.where(seen, jnp.arange(1, seen.size + 1), 0))
    return jax.lax.fori_loop(0, end, lambda i, carry: block(end - 1 - i, carry), start)


def _block(tree, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _block_sizes(T, S):
    """One query, as in decoding, meets all keys at once."""
    block = _CPU_BLOCK if target_platform() == "cpu" else _BLOCK
    return min(T, block), S if T == 1 else min(S, block)


def _by_head(x: Float[Array, "B T H K"], G: int) -> Float[Array, "B G R T K"]:
    return jnp.moveaxis(x.reshape(*x.shape[:2], G, -1, x.shape[-1]), 1, 3)


def _by_token(x: Float[Array, "*N B G R T K"]) -> Float[Array, "*N B T H K"]:
    x = jnp.moveaxis(x, -2, -4)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _dot(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=_wide(x))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
