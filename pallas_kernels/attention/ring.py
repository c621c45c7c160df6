"""Attention over a split row by a ring: keys and values go around, queries stay.

Ring Attention (https://arxiv.org/abs/2310.01889), with the running softmax kept by each device. The
mask is causal, so a contiguous split would leave the first devices idle (Striped Attention,
https://arxiv.org/abs/2311.09431); here the row is cut into 2 P halves of shards, and device i of P
works on halves i and 2 P - 1 - i. A later device's first half is then always seen by the own second
half, and one of first-first and second-second is seen as well: the same work on every device in
every step. Blocks of keys that no query sees are skipped by the local form, from their places.

The backward pass is a ring too, in which keys and values carry their gradients home, so memory is
that of a few shards.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla
from pallas_kernels.precision import exact_products


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attention(q, k, v, q_segments, k_segments, window, scale, axis):
    """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]: parts of T tokens of the row."""
    return _forward(q, k, v, q_segments, k_segments, window, scale, axis)[0]


def _forward(q, k, v, q_segments, k_segments, window, scale, axis):
    T = q.shape[1]
    queries, q_at, held = _zigzag_all(q, k, v, q_segments, k_segments, axis)

    def step(_, carry):
        seen, (k, v, k_at) = carry
        part = xla.forward(queries, k, v, q_at, k_at, window, scale)
        return _merge(seen, part), _pass_on((k, v, k_at), axis)

    logsumexp = jnp.full_like(queries[..., 0], -jnp.inf, _f32(v))
    nothing = jnp.zeros((*logsumexp.shape, v.shape[-1]), logsumexp.dtype), logsumexp
    start = xla.alike(nothing, queries), held
    seen, _ = jax.lax.fori_loop(0, jax.lax.axis_size(axis), step, start)
    o, logsumexp = (_contiguous(x, axis)[:, :T] for x in seen)
    o = o.astype(v.dtype)
    return o, (q, k, v, q_segments, k_segments, window, o, logsumexp)


def _backward(scale, axis, residuals, do):
    q, k, v, q_segments, k_segments, window, o, logsumexp = residuals
    T, dtype = q.shape[1], _f32(v)
    delta = jnp.sum(o.astype(dtype) * do, axis=-1)
    queries, q_at, held = _zigzag_all(q, k, v, q_segments, k_segments, axis)
    logsumexp, delta, do = (_zigzag(x, axis) for x in (logsumexp, delta, do))

    def step(_, carry):
        dq, (k, v, k_at), (dk, dv) = carry
        parts = xla.backward(
            queries, k, v, q_at, k_at, window, scale, logsumexp, delta, do)
        dq, dk, dv = jax.tree.map(jnp.add, (dq, dk, dv), parts)
        return dq, *_pass_on(((k, v, k_at), (dk, dv)), axis)

    zero = lambda x: jnp.zeros_like(x, dtype)
    start = zero(queries), held, (zero(held[0]), zero(held[1]))
    dq, _, (dk, dv) = jax.lax.fori_loop(0, jax.lax.axis_size(axis), step, start)
    home = lambda dx, x: _contiguous(dx, axis)[:, :T].astype(x.dtype)
    return home(dq, q), home(dk, k), home(dv, v), None, None, None


attention.defvjp(_forward, exact_products(_backward))


def _f32(v):
    return jnp.promote_types(v.dtype, jnp.float32)


def _pass_on(tree, axis):
    """To the next device; once around and everything is home again."""
    size = jax.lax.axis_size(axis)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


def _merge(first, second):
    """Softmax over two sets of keys, from the outputs and logsumexps over each."""
    (o_1, lse_1), (o_2, lse_2) = first, second
    total = jnp.logaddexp(lse_1, lse_2)
    share = lambda lse: jnp.exp(lse - xla.base(total))[..., None]
    return share(lse_1) * o_1 + share(lse_2) * o_2, total


# ---------------------------------------------------------------- the zigzag


def _zigzag_all(q, k, v, q_segments, k_segments, axis):
    """The queries, their places, and keys and values with theirs, as this device works on them."""
    T = q.shape[1]
    index, real = _zigzag_index(T, axis)
    q, k, v, q_segments, k_segments = jax.tree.map(
        lambda x: _zigzag(x, axis), (q, k, v, q_segments, k_segments))
    q_at = xla.Places(index, q_segments)
    k_at = xla.Places(jnp.where(real, index, xla.NEVER), k_segments)
    return q, q_at, (k, v, k_at)


def _zigzag_index(T, axis):
    """Each token's place in the row, and whether it is one: an odd T is filled up by one."""
    size, me, half = jax.lax.axis_size(axis), jax.lax.axis_index(axis), -(-T // 2)
    halves = jnp.stack([me, 2 * size - 1 - me])[:, None]
    within = half * (halves % 2) + jnp.arange(half)
    index = halves // 2 * T + within
    return index.reshape(1, -1), (within < T).reshape(1, -1)


def _zigzag(x, axis):
    """Shards in the row's order [B, T, ...] -> halves i and 2 P - 1 - i on device i."""
    x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2))
    routes = _routes(axis)
    received = [jax.lax.ppermute(half, axis, route)
                for half, route in zip(jnp.split(x, 2, axis=1), routes, strict=True)]
    return jnp.concatenate(_swapped_on_odd(received, axis), axis=1)


def _contiguous(x, axis):
    """Its inverse; the filling of an odd T stays."""
    sent = _swapped_on_odd(jnp.split(x, 2, axis=1), axis)
    return jnp.concatenate(
        [jax.lax.ppermute(half, axis, [(to, origin) for origin, to in route])
         for half, route in zip(sent, _routes(axis), strict=True)], axis=1)


def _routes(axis):
    """For the first halves of all shards and for the second ones: (origin, target) pairs.

    Halves i and 2 P - 1 - i differ in parity: each device receives one first and one second half.
    """
    size = jax.lax.axis_size(axis)
    target = lambda half: min(half, 2 * size - 1 - half)
    return [[(i, target(2 * i + second)) for i in range(size)] for second in (0, 1)]


def _swapped_on_odd(pair, axis):
    """Half i is a first half of a shard where i is even, else a second half."""
    odd = jax.lax.axis_index(axis) % 2 == 1
    return [jnp.where(odd, b, a) for a, b in (pair, pair[::-1])]
