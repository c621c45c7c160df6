"""The next-token loss, with logits made a slice of tokens at a time."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from hybridjax.layers.embedding import head_logits
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import RULES, over_mesh, place, ways

SLICE = 2**26  # logits per device that may exist at once


def next_token_loss(
    model: Decoder,
    h: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T"], Float[Array, "B T"]]:
    """Weighted sum over tokens of cross-entropy + z_loss * logsumexp² (arXiv 2204.02311, §5).

    `[B, T, vocab]` never exists for a large vocabulary: slices of the tokens are scanned, and
    their logits are made again in the backward pass. Each device scans its own tokens, so that the
    head is gathered, and its gradient summed over devices, once and not for each slice.

    Returns:
      the sum, each token's cross-entropy in nats, and whether the target was the likeliest token.
    """
    tokens = ("batch", "length")
    targets, weights = place(targets, *tokens), place(weights, *tokens)
    head = place(model.head_kernel().astype(h.dtype), None, "vocab")
    losses, nats, hit = over_mesh(
        functools.partial(_token_losses, z_loss),
        in_axes=((None, "vocab"), (*tokens, None), tokens),
        out_axes=((tokens, targets.shape),) * 3,
        cut=RULES.batch + RULES.length,
    )(head, h, targets)
    return jnp.sum(weights * losses), nats, hit


def _token_losses(
    z_loss: float,
    head: Float[Array, "D vocab"],
    h: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """For each token its loss, its cross-entropy and whether the target was the likeliest."""

    def losses(h, targets):
        logits = head_logits(h, head)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logit = pick(logits, targets)
        nats = log_z - target_logit
        hit = target_logit >= jnp.max(logits, axis=-1)
        return nats + z_loss * jnp.square(log_z), nats, hit.astype(jnp.float32)

    return in_slices(losses, head.shape[1], h, targets)


def in_slices(f: Callable, vocab: int, *rows: Shaped[Array, "B T ..."]) -> Any:
    """`f(*rows)`, values per token, on slices of the tokens that have at most `SLICE` logits.

    Slices are scanned, and what `f` makes of one is made again in the backward pass.
    """
    batch, length = rows[0].shape[:2]
    count = _slices(batch, length, vocab // ways("vocab", vocab))
    if count == 1:
        return f(*rows)
    split = lambda x: jnp.moveaxis(x.reshape(batch, count, -1, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length)
    body = lambda _, part: (None, jax.checkpoint(f)(*part))
    return jax.tree.map(join, jax.lax.scan(body, None, tuple(map(split, rows)))[1])


def pick(logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """`logits[b, t, targets[b, t]]`, as a sum so that a sharded vocabulary stays where it is."""
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def _slices(batch: int, length: int, vocab: int) -> int:
    """The smallest number of equal slices of the length that keeps each below `SLICE` logits."""
    wanted = math.ceil(batch * length * vocab / SLICE)
    return next((n for n in range(wanted, length) if length % n == 0), length)
