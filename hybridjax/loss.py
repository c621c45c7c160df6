"""The next-token loss, with logits made a slice of tokens at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.models.decoder import Decoder
from hybridjax.sharding import ways

SLICE = 2**24  # logits per device that may exist at once


def next_token_loss(
    model: Decoder,
    h: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T"], Float[Array, "B T"]]:
    """Weighted sum over tokens of cross-entropy + z_loss * logsumexp² (arXiv 2204.02311, §5).

    `[B, T, vocab]` never exists for a large vocabulary: slices of the tokens are scanned, and
    their logits are made again in the backward pass.

    Returns:
      the sum, each token's cross-entropy in nats, and whether the target was the likeliest token.
    """

    def loss(h, targets, weights):
        logits = model.logits(h)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logit = _pick(logits, targets)
        nats = log_z - target_logit
        hit = target_logit >= jnp.max(logits, axis=-1)
        total = jnp.sum(weights * (nats + z_loss * jnp.square(log_z)))
        return total, nats, hit.astype(jnp.float32)

    count = _slices(h.shape[0] // ways("batch") * h.shape[1] // ways("length"), h.shape[1], model)
    if count == 1:
        return loss(h, targets, weights)

    def body(total, slice):
        value, nats, hit = jax.checkpoint(loss)(*slice)
        return total + value, (nats, hit)

    # Strided slices, so that each device keeps its own part of the sequence in every one.
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(targets.shape)
    total, (nats, hit) = jax.lax.scan(body, 0.0, (split(h), split(targets), split(weights)))
    return total, join(nats), join(hit)


def _pick(logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """`logits[b, t, targets[b, t]]`, as a sum so that a sharded vocabulary stays where it is."""
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def _slices(tokens: int, length: int, model: Decoder) -> int:
    """The smallest number of equal slices of the length that keeps each below `SLICE` logits."""
    wanted = math.ceil(tokens * model.embedding.table.shape[0] / ways("vocab") / SLICE)
    local = length // ways("length")
    return next((n for n in range(wanted, local) if local % n == 0), local)
