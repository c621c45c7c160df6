"""Linear attention by chunks: matrix products inside a chunk, one state from chunk to chunk.

Lightning Attention-2 (https://arxiv.org/abs/2401.04658), algorithm 1, with all chunks at once:
only the states pass through a scan. With G the running sum of the log decay in the chunk,

    o_i = sum_{j <= i} exp(G_i - G_j) (q_i . k_j) v_j + exp(G_i) q_i S_in
    S_out = exp(G_end) S_in + sum_j exp(G_end - G_j) k_j v_j^T

Every exponent is a difference <= 0 and is masked before it is taken.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.chunks import in_chunks, running_sum, within_documents


class Weights(NamedTuple):
    """What decay and documents contribute; B and N are 1 where nothing varies along them."""

    intra: Float[Array, "B H N C C"]  # of token j in the output of token i of its chunk
    read: Float[Array, "B H N C 1"]  # of the incoming state in the output of a token
    write: Float[Array, "B H N C 1"]  # of a token in the outgoing state
    keep: Float[Array, "B H N 1 1"]  # of the incoming state in the outgoing state


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    T = q.shape[1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    # Chunks as long as heads are wide: products within a chunk and with the state cost alike.
    C = min(T, chunk_size or max(32, min(v.shape[-1], 128)))
    if segments is not None:
        segments = in_chunks(segments[..., None], C)
    if decay.ndim == 1:
        weights = _constant_decay(decay.astype(dtype), T, C, segments)
    else:
        weights = _token_decay(in_chunks(decay.astype(dtype), C), segments)

    qc, kc, vc = (in_chunks(x.astype(dtype), C) for x in (q, k, v))
    o = (qc @ kc.mT * (scale * weights.intra)) @ vc
    state = None
    if T > C or initial_state is not None or output_final_state:
        update = (kc * weights.write).mT @ vc
        incoming, state = _pass_states(initial_state, update, weights.keep)
        o += (qc * (scale * weights.read)) @ incoming
    o = jnp.moveaxis(o.reshape(*o.shape[:2], -1, v.shape[-1]), 1, 2)
    return o[:, :T].astype(v.dtype), state


def _pass_states(initial_state, update, keep):
    """The state before each chunk [B, H, N, K, V], and the one after the last [B, H, K, V]."""

    def step(state, chunk):
        update, keep = chunk
        return keep * state + update, state

    state = jnp.zeros_like(update[:, :, 0])
    if initial_state is not None:
        state += initial_state
    chunks = (jnp.moveaxis(update, 2, 0), jnp.moveaxis(keep, 2, 0))
    state, incoming = jax.lax.scan(step, state, chunks, unroll=min(8, update.shape[2]))
    return jnp.moveaxis(incoming, 0, 2), state


def _constant_decay(decay, T, C, segments):
    """Weights for a decay [H]; a NumPy decay makes them constants of the program."""
    xp = np if isinstance(decay, np.ndarray) else jnp
    decay = decay[:, None, None, None]
    i = np.arange(C)
    distance = i[:, None] - i
    intra = xp.exp(xp.where(distance >= 0, decay * distance, -np.inf))[None]
    if segments is None:
        seen = np.minimum(np.arange(1, T + -T % C + 1), T).reshape(1, 1, -1, C)
        seen = seen - np.arange(0, T, C)[:, None]  # tokens of the chunk so far
    else:
        seen = jnp.cumsum(segments != 0, axis=-1)
    return _weights(intra, decay[..., 0] * seen, segments)


def _token_decay(decay, segments):
    """Weights for a decay [B, H, N, C]."""
    if segments is not None:
        decay = jnp.where(segments != 0, decay, 0)
    total, rest = running_sum(decay)
    before = np.tri(decay.shape[-1], k=-1, dtype=bool)
    difference = total[..., :, None] - total[..., None, :]
    difference += rest[..., :, None] - rest[..., None, :]
    own = np.where(np.eye(len(before)), 0, -np.inf)  # not by the difference: gradients would cancel
    intra = jnp.exp(jnp.where(before, difference, own))
    return _weights(intra, total, segments, rest)


def _weights(intra, total, segments, rest=0):
    """Weights from those within a chunk and the running sum of the decay [B, H, N, C].

    `rest` is what rounding took from the sum.
    """
    xp = np if isinstance(total, np.ndarray) else jnp
    end = total[..., -1:]
    left = end - total
    if isinstance(rest, jax.Array):
        own = np.arange(total.shape[-1]) == total.shape[-1] - 1
        left = jnp.where(own, 0, left + (rest[..., -1:] - rest))
    read, write, keep = xp.exp(total), xp.exp(left), xp.exp(end)
    if segments is not None:
        same = (segments[..., :, None] == segments[..., None, :]) & (segments != 0)[..., None]
        intra = jnp.where(same, intra, 0)
        read, write, keep = within_documents(segments, read, write, keep)
    return Weights(intra, read[..., None], write[..., None], keep[..., None])
