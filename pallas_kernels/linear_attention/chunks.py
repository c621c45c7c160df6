"""Rows cut into chunks, [B, H, N, C]: what every chunked form of linear attention begins with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.documents import at_borders, cut_at_borders


def in_chunks(x, C):
    """[B, T, H] -> [B, H, N, C], or [B, T, H, K] -> [B, H, N, C, K]; T padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % C)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], -1, C, *x.shape[3:])


def running_sum(decay):
    """The running sum along the last axis and, without gradient, what rounding took from it.

    Differences of sums are wanted, and strong decays make them small beside the sums.
    """
    total = jnp.cumsum(decay, axis=-1)
    this = jax.lax.stop_gradient(total)
    last = jnp.pad(this, [(0, 0)] * (this.ndim - 1) + [(1, 0)])[..., :-1]
    step = this - last
    kept = this - step  # step + error is the exact difference (Knuth's two-sum)
    error = (this - (step + kept)) + (kept - last)
    return total, jnp.cumsum((jax.lax.stop_gradient(decay) - step) - error, axis=-1)


def decay_of_tokens(decay, segments, shape):
    """A log decay [B, T, H] in f32, 0 for padding, from one of that shape or [H]."""
    # The barrier: else the compiler computes what a constant decay gives for all B T H tokens.
    decay = jax.lax.optimization_barrier(jnp.asarray(decay, jnp.float32))
    decay = jnp.broadcast_to(decay, shape)
    return decay if segments is None else jnp.where(segments[..., None] != 0, decay, 0)


def decay_gradient(within, written, through):
    """That of the log decay [B, H, N, C], which has a part in all that passes a token.

    Every term is that of pairs of tokens which it lies between: nothing large cancels.

    Args:
      within: [B, H, N, C] of each token that reads, what passes all tokens up to it.
      written: [B, H, N, C] of each token, what it writes into the state behind the chunk.
      through: [B, H, N] of the state that passes the whole chunk.
    """
    before = jnp.pad(written[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    return (jax.lax.cumsum(within, axis=3, reverse=True) + jnp.cumsum(before, axis=3)
            + through[..., None])


def within_documents(segments: Int[Array, "B 1 N C"], read, write, keep):
    """Weights [B, H, N, C] of the states that enter and leave chunks, and `keep` [B, H, N, 1], cut
    where documents end."""
    B, _, N, C = segments.shape
    borders = at_borders(segments.reshape(B, N * C), C)
    before, after = (document[:, None, :, None] for document in borders)
    return cut_at_borders(segments, before, after, read, write, keep)
