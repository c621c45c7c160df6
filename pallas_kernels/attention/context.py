"""Attention over a row that is split along a mesh axis: which exchange, and the simple ones.

The parts lie in the row's order. `ring` (in ring.py) is for full attention; here are

  border  each device takes the last `window - 1` keys before its own from its left neighbours;
  gather  each device takes all keys;
  merge   the keys stay where they are and the queries, few, are on every device: partial results
          meet, weighted by their sums of exponentials (FlashDecoding).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import ring, xla
from pallas_kernels.precision import exact_products

EXCHANGES = ("ring", "border", "gather", "merge")


def attention(
    q, k, v, *, scale, q_segments, k_segments, q_index, k_index, window, axis, exchange
):
    """The arguments of `attention`, on the devices along `axis`."""
    others = q_segments, k_segments, q_index, k_index, window, jax.lax.axis_index(axis)
    q, k, v = xla.alike((q, k, v), others)
    T, size = k.shape[1], jax.lax.axis_size(axis)
    exchange = exchange or _best(T, size, window)
    if exchange == "merge":
        return _merged(q, k, v, q_segments, k_segments, q_index, k_index, window, scale, axis)
    if q_index is not None or k_index is not None:
        raise ValueError(f"exchange={exchange!r} takes no q_index, k_index: parts of a row are in "
                         "its order; for whole queries and split keys use exchange='merge'")
    if exchange == "ring":
        return ring.attention(q, k, v, q_segments, k_segments, window, scale, axis)
    if exchange == "border" and not isinstance(window, int):
        raise ValueError(f"exchange='border' needs a window known at compile time, got {window!r}")
    reach = min(window - 1, (size - 1) * T) if exchange == "border" else None
    return _fetched(q, k, v, q_segments, k_segments, window, scale, axis, reach)


def _best(T, size, window):
    """A window beyond half of the row is nearly full attention: the ring holds less of it."""
    short = isinstance(window, int) and _hops(window - 1, T) <= size // 2
    return "border" if short else "ring"


# ---------------------------------------------------------------- border and gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _fetched(q, k, v, q_segments, k_segments, window, scale, axis, reach):
    """`reach`: how many keys before its own a device fetches; None: all keys of the row."""
    return _fetched_forward(q, k, v, q_segments, k_segments, window, scale, axis, reach)[0]


def _fetched_forward(q, k, v, q_segments, k_segments, window, scale, axis, reach):
    k_row, v_row, q_at, k_at = _fetch_all(k, v, q_segments, k_segments, axis, reach)
    o, logsumexp = xla.forward(q, k_row, v_row, q_at, k_at, window, scale)
    o = o.astype(v.dtype)
    return o, (q, k, v, q_segments, k_segments, window, o, logsumexp)


def _fetched_backward(scale, axis, reach, residuals, do):
    q, k, v, q_segments, k_segments, window, o, logsumexp = residuals
    delta = jnp.sum(o.astype(logsumexp.dtype) * do, axis=-1)
    # The keys are fetched again: kept, they would be as long as the row.
    k_row, v_row, q_at, k_at = _fetch_all(k, v, q_segments, k_segments, axis, reach)
    dq, dk, dv = xla.backward(
        q, k_row, v_row, q_at, k_at, window, scale, logsumexp, delta, do)
    home = lambda dx, x: _give_back(dx, x.shape[1], axis, reach).astype(x.dtype)
    return dq.astype(q.dtype), home(dk, k), home(dv, v), None, None, None


_fetched.defvjp(_fetched_forward, exact_products(_fetched_backward))


def _fetch_all(k, v, q_segments, k_segments, axis, reach):
    """All keys and values that the local queries may see, and the places of both."""
    T = k.shape[1]
    k, v, k_segments = jax.tree.map(lambda x: _fetch(x, axis, reach), (k, v, k_segments))
    start = T * jax.lax.axis_index(axis)
    k_index = jnp.arange(k.shape[1]) + (0 if reach is None else start - reach)
    k_index = jnp.where(k_index < 0, xla.NEVER, k_index)  # before the row
    q_at = xla.Places(start + jnp.arange(T)[None], q_segments)
    k_at = xla.Places(k_index[None], k_segments)
    return k, v, q_at, k_at


def _fetch(x, axis, reach):
    """The keys `[B, T, ...]` of this device behind those of its left neighbours."""
    if reach is None:
        return jax.lax.all_gather(x, axis, axis=1, tiled=True)
    T, parts = x.shape[1], [x]
    for hop in range(1, _hops(reach, T) + 1):
        tail = x[:, T - _taken(hop, reach, T) :]
        parts.append(jax.lax.ppermute(tail, axis, _shift(hop, axis)))
    return jnp.concatenate(parts[::-1], axis=1)


def _give_back(dx, T, axis, reach):
    """Its transpose: each key's gradient, summed on the device that holds the key."""
    if reach is None:
        return jax.lax.psum_scatter(dx, axis, scatter_dimension=1, tiled=True)
    own, end = dx[:, -T:], reach
    for hop in range(1, _hops(reach, T) + 1):
        taken = _taken(hop, reach, T)
        tail = jax.lax.ppermute(dx[:, end - taken : end], axis, _shift(-hop, axis))
        own, end = own.at[:, T - taken :].add(tail), end - taken
    return own


def _hops(reach, T):
    return -(-reach // T)


def _taken(hop, reach, T):
    """How many keys come from the neighbour this many places to the left."""
    return min(T, reach - (hop - 1) * T)


def _shift(hop, axis):
    """Routes to the right, not around: the first devices receive zeros."""
    size = jax.lax.axis_size(axis)
    return [(i, i + hop) for i in range(size) if 0 <= i + hop < size]


# ---------------------------------------------------------------- merge


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _merged(q, k, v, q_segments, k_segments, q_index, k_index, window, scale, axis):
    q_at, k_at = xla.Places(q_index, q_segments), xla.Places(k_index, k_segments)
    o, logsumexp = xla.forward(q, k, v, q_at, k_at, window, scale)
    share = jnp.exp(logsumexp - xla.base(jax.lax.pmax(logsumexp, axis)))[..., None]
    o, total = jax.lax.psum((share * o, share), axis)
    return (o / xla.nonzero(total)).astype(v.dtype)


def _no_gradient(*_):
    raise NotImplementedError("attention: exchange='merge' is for decoding and has no gradient")


_merged.defvjp(_no_gradient, _no_gradient)
