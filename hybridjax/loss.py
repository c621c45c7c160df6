"""The next-token loss, with logits made a slice of tokens at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.models.decoder import Decoder
from hybridjax.sharding import place, ways

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

    # As the stream is: a choice of each token's logit would else be made on every device for all.
    targets, weights = (place(x, "batch", "length") for x in (targets, weights))
    batch, length = targets.shape
    count = _slices(batch // ways("batch", batch), length // ways("length", length), model)
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


def _slices(batch: int, length: int, model: Decoder) -> int:
    """The smallest number of equal slices of a device's `length` tokens of each row that keeps
    each below `SLICE` logits."""
    vocab = model.embedding.table.shape[0]
    wanted = math.ceil(batch * length * vocab / ways("vocab", vocab) / SLICE)
    return next((n for n in range(wanted, length) if length % n == 0), length)
