"""Rows cut into chunks, and what decay and documents contribute to each chunk.

Chunks come in spans: a layout [S, n, B, H, C, ...] has S spans of n chunks of C tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.documents import at_borders, cut_at_borders


class Documents(NamedTuple):
    """Which document each token belongs to, and whose state enters and leaves each chunk."""

    tokens: Int[Array, "*S B 1 C"]
    before: Int[Array, "*S B 1 1"]
    after: Int[Array, "*S B 1 1"]


class Weights(NamedTuple):
    """Decay from one place of a chunk to another; 0 where a document ends between them."""

    intra: Float[Array, "*S B H C C"]  # from token j to token i >= j
    read: Float[Array, "*S B H C 1"]  # from the incoming state to a token
    write: Float[Array, "*S B H C 1"]  # from a token to the outgoing state
    keep: Float[Array, "*S B H 1 1"]  # from the incoming state to the outgoing one


def cut(x: Array, n: int, C: int) -> Array:
    """[B, T, H, ...] -> [S, n, B, H, C, ...]; T padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % (n * C))] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], x.shape[1] // (n * C), n, C, *x.shape[2:])
    return x.transpose(1, 2, 0, 4, 3, *range(5, x.ndim))


def joined(x: Array, T: int) -> Array:
    """The inverse of `cut`, for a row of T tokens."""
    x = x.transpose(2, 0, 1, 4, 3, *range(5, x.ndim))
    return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :T]


def documents(segments: Int[Array, "B T"], n: int, C: int) -> Documents:
    B, T = segments.shape
    row = jnp.pad(segments, [(0, 0), (0, -T % (n * C))])
    before, after = at_borders(row, C)
    per_chunk = lambda x: x.T.reshape(-1, n, B, 1, 1)
    return Documents(cut(row[..., None], n, C), per_chunk(before), per_chunk(after))


def running_sums(decay: Float[Array, "*S C"]) -> tuple[Array, Array]:
    """The running sums of the decay's whole parts and of the rest.

    Integers add up exactly, so that after a strong decay weak ones keep their digits.
    """
    whole = jnp.round(decay)
    return jnp.cumsum(whole, axis=-1), jnp.cumsum(decay - whole, axis=-1)


def weights(decay: Float[Array, "*S B H C"], documents: Documents | None) -> Weights:
    """Every exponent is a sum of log decays <= 0, and is masked before it is taken."""
    if documents is not None:
        decay = jnp.where(documents.tokens != 0, decay, 0)
    sums = running_sums(decay)
    between = sum(x[..., :, None] - x[..., None, :] for x in sums)
    intra = jnp.exp(jnp.where(np.tri(decay.shape[-1], dtype=bool), between, -jnp.inf))
    read, write = jnp.exp(sum(sums)), jnp.exp(sum(x[..., -1:] - x for x in sums))
    keep = read[..., -1:]
    if documents is not None:
        tokens, before, after = documents
        same = (tokens[..., :, None] == tokens[..., None, :]) & (tokens != 0)[..., None]
        intra = jnp.where(same, intra, 0)
        read, write, keep = cut_at_borders(tokens, before, after, read, write, keep)
    return Weights(intra, read[..., None], write[..., None], keep[..., None])
