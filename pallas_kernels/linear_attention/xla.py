"""Linear attention by chunks: matrix products inside a chunk, one state from chunk to chunk.

Lightning Attention-2 (https://arxiv.org/abs/2401.04658), algorithm 1. With G the running sum of
the log decay in the chunk,

    o_i = sum_{j <= i} exp(G_i - G_j) (q_i . k_j) v_j + exp(G_i) q_i S_in
    S_out = exp(G_end) S_in + sum_j exp(G_end - G_j) k_j v_j^T

Every exponent is a difference <= 0 and is masked before it is taken.

Chunks are worked on a span at a time: all chunks of a span at once, but for the passing of states.
Between spans only the state is kept, and the backward pass computes the rest of a span again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_attention.chunks import in_chunks, running_sum, within_documents

_SPAN = 8  # chunks


class Weights(NamedTuple):
    """What decay and documents contribute; B is 1 where rows do not differ."""

    read: Float[Array, "B H N C 1"]  # of the incoming state in the output of a token
    write: Float[Array, "B H N C 1"]  # of a token in the outgoing state
    keep: Float[Array, "B H N 1 1"]  # of the incoming state in the outgoing state
    sums: tuple[Float[Array, "B H N C"], ...] | None  # `running_sum` of a decay per token
    segments: Int[Array, "B 1 N C"] | None


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    T, V = v.shape[1], v.shape[-1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    # Chunks as long as heads are wide: products within a chunk and with the state cost alike.
    C = min(T, chunk_size or max(32, min(V, 128)))
    spans = -(-T // (_SPAN * C))
    N = -(-T // (spans * C)) * spans  # spans are as even as possible
    if segments is not None:
        segments = _chunks(segments[..., None], N, C)
    if decay.ndim == 1:
        intra, weights = _constant_decay(decay.astype(dtype), T, N, C, segments)
    else:
        intra, weights = None, _token_decay(_chunks(decay.astype(dtype), N, C), T, segments)

    q, k, v = (_chunks(x, N, C) for x in (q, k, v))
    state = None
    if T > C or initial_state is not None or output_final_state:
        state = jnp.zeros_like(k[:, :, 0, 0, :, None] * v[:, :, 0, 0, None], dtype)
        if initial_state is not None:
            state += initial_state
    attend = functools.partial(_attend, scale, dtype, intra)
    if spans == 1:
        state, o = attend(state, (q, k, v, weights))
    else:
        split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], spans, -1, *x.shape[3:]), 2, 0)
        step = jax.checkpoint(attend, prevent_cse=False)
        state, o = jax.lax.scan(step, state, jax.tree.map(split, (q, k, v, weights)))
        o = jnp.moveaxis(o, 0, 2)
    o = jnp.moveaxis(o.reshape(*o.shape[:2], -1, V), 1, 2)
    return o[:, :T], state


def _chunks(x, N, C):
    """[B, T, H, ...] -> [B, H, N, C, ...]; T padded with zeros."""
    return in_chunks(jnp.pad(x, [(0, 0), (0, N * C - x.shape[1])] + [(0, 0)] * (x.ndim - 2)), C)


def _attend(scale, dtype, intra, state, span):
    """The state after a span and its outputs; without a state, those of a row's only chunk."""
    q, k, v, weights = span
    if intra is None:
        intra = _between(*weights.sums)
    if weights.segments is not None:
        intra = jnp.where(_same_document(weights.segments), intra, 0)
    q, k, values = (x.astype(dtype) for x in (q, k, v))
    o = (q @ k.mT * (scale * intra)) @ values
    if state is not None:
        update = (k * weights.write).mT @ values
        state, incoming = _pass_states(state, update, weights.keep)
        o += (q * (scale * weights.read)) @ incoming
    return state, o.astype(v.dtype)


def _pass_states(state, update, keep):
    """The state after the last chunk [B, H, K, V], and that before each [B, H, N, K, V]."""

    def step(state, chunk):
        update, keep = chunk
        return keep * state + update, state

    chunks = (jnp.moveaxis(update, 2, 0), jnp.moveaxis(keep, 2, 0))
    state, incoming = jax.lax.scan(step, state, chunks, unroll=min(8, update.shape[2]))
    return state, jnp.moveaxis(incoming, 0, 2)


def _constant_decay(decay, T, N, C, segments):
    """Weights for a decay [H], and those within chunks [H, 1, C, C].

    A NumPy decay makes them constants of the program.
    """
    xp = np if isinstance(decay, np.ndarray) else jnp
    i = np.arange(C)
    distance = i[:, None] - i
    decay = decay[:, None, None]
    intra = xp.exp(xp.where(distance >= 0, decay[..., None] * distance, -np.inf))
    if segments is None:
        seen = np.clip(T - C * np.arange(N)[:, None], 0, i + 1)[None, None]  # of the chunk so far
    else:
        seen = jnp.cumsum(segments != 0, axis=-1)
    return intra, _weights(decay * seen, segments)


def _token_decay(decay, T, segments):
    """Weights for a decay [B, H, N, C]."""
    real = segments != 0
    if segments is None:
        real = np.arange(decay[0, 0].size).reshape(decay.shape[2:]) < T
    xp = np if segments is None else jnp
    from_here = xp.flip(xp.cumsum(xp.flip(real, -1), axis=-1), -1)  # how many are real
    total, rest = running_sum(jnp.where(real, decay, 0))
    return _weights(total, segments, rest, last=from_here == real)._replace(sums=(total, rest))


def _between(total, rest):
    """Weights within chunks [B, H, N, C, C] by the running sum of the decay."""
    before = np.tri(total.shape[-1], k=-1, dtype=bool)
    difference = total[..., :, None] - total[..., None, :]
    difference += rest[..., :, None] - rest[..., None, :]
    own = np.where(np.eye(len(before)), 0, -np.inf)  # not by the difference: gradients would cancel
    return jnp.exp(jnp.where(before, difference, own))


def _same_document(segments):
    return (segments[..., :, None] == segments[..., None, :]) & (segments != 0)[..., None]


def _weights(total, segments, rest=None, last=None):
    """Weights from the running sum of the decay [B, H, N, C]; `rest` is its rounding.

    `last` tells tokens after which nothing decays in a chunk: their part of the decay's gradient,
    the end's less their own, would cancel but for rounding.
    """
    xp = np if isinstance(total, np.ndarray) else jnp
    end = total[..., -1:]
    left = end - total
    if rest is not None:
        left = jnp.where(last, 0, left + (rest[..., -1:] - rest))
    read, write, keep = xp.exp(total), xp.exp(left), xp.exp(end)
    if segments is not None:
        read, write, keep = within_documents(segments, read, write, keep)
    return Weights(read[..., None], write[..., None], keep[..., None], None, segments)
