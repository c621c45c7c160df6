"""The documents of rows worked on by chunks, with a state that passes from chunk to chunk."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def at_borders(
    row: Int[Array, "B T"], C: int
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The documents whose state enters and leaves each chunk of C tokens; T is a multiple of C.

    It is the last one seen; before any was seen, the row's first, to which the initial state
    belongs.
    """
    real = row != 0
    latest = jax.lax.cummax(jnp.where(real, np.arange(row.shape[1]), -1), axis=1)[:, C - 1 :: C]
    first = jnp.argmax(real, axis=1)[:, None]
    after = jnp.take_along_axis(row, jnp.where(latest < 0, first, latest), axis=1)
    first = jnp.take_along_axis(row, first, axis=1)
    return jnp.concatenate([first, after[:, :-1]], axis=1), after


def cut_at_borders(segments, before, after, read, write, keep):
    """The weights of a chunk's state, 0 where a document ends on the way or a token is padding.

    `read` is that of the incoming state in a token, `write` of a token in the outgoing state, both
    [..., C] as `segments` is; `keep` of the incoming in the outgoing one, [..., 1] as `before` and
    `after` are.
    """
    real = segments != 0
    read = jnp.where(real & (segments == before), read, 0)
    write = jnp.where(real & (segments == after), write, 0)
    return read, write, jnp.where(before == after, keep, 0)


def first_of_document(tokens: Int[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Where in its chunk the document of each token begins; C for padding."""
    C = tokens.shape[-1]
    begins = tokens[..., 1:] != tokens[..., :-1]
    begins = jnp.pad(begins, [(0, 0)] * (tokens.ndim - 1) + [(1, 0)])
    first = jax.lax.cummax(jnp.where(begins, np.arange(C), 0), axis=tokens.ndim - 1)
    return jnp.where(tokens != 0, first, C).astype(jnp.float32)


def to_compare(segments: Int[Array, "*B C"]) -> Int[Array, "*B 2 C"]:
    """The documents of tokens i and of tokens j, equal where it is one; padding equals none."""
    none = jnp.iinfo(jnp.int32).min
    sides = [jnp.where(segments != 0, segments, none + n) for n in range(2)]
    return jnp.stack(sides, axis=-2).astype(jnp.int32)
