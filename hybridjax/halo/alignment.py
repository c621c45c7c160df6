"""Stage 1: each linear mixer learns its attention's output (arXiv 2601.22156, section 3).

All layers are trained in one run, each on the teacher's own stream, so none sees another's error.
The gradient is taken layer by layer inside the fold, which keeps the memory of one layer.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hybridjax.halo.config import AlignConfig
from hybridjax.mixers.base import Context, Mixer
from hybridjax.models.decoder import Decoder
from hybridjax.optimizer import make_optimizer


def alignment_gradients(
    mixers: Mixer,
    batch: dict[str, Array],
    weight: Float[Array, ""],
    key: Array,
    teacher: Decoder,
) -> tuple[Float[Array, ""], dict[str, tuple[Array, Array]], Mixer]:
    """Mean over layers of the mean squared error, each layer's relative error, and gradients.

    A layer's gradient is that of its own mean squared error, over all tokens and channels.
    `weight`: the number of real tokens in the batch of which this may be a part.
    """
    real = (batch["segments"] > 0)[..., None]
    ctx = Context(batch["positions"], batch["segments"], key=key)
    width = teacher.norm.scale.shape[0]

    def align(attention, x, ctx, mixer):
        """Runs the attention, and takes the mixer's gradient where it is at hand."""
        y = attention(x, ctx)
        target = y.astype(jnp.float32)

        def loss(mixer):
            error = mixer(x, ctx).astype(jnp.float32) - target
            return jnp.sum(real * jnp.square(error)) / (weight * width)

        value, grads = jax.value_and_grad(loss)(mixer)
        power = jnp.sum(real * jnp.square(target)) / (weight * width)
        return y, (value, power, grads), {}

    def layer(block, h, ctx, mixer):
        h, ctx, [aligned] = block.residuals(align, h, ctx, [mixer])
        return h, ctx, aligned

    h = teacher.embedding(batch["tokens"], jnp.dtype(teacher.dtype))
    _, outs = teacher.fold(layer, h, ctx, mixers)
    [[(losses, powers, grads)]] = outs.groups
    errors = {f"error_{i}": (losses[i], powers[i]) for i in range(len(teacher.layers))}
    return jnp.mean(losses), errors, grads


def alignment_optimizer(
    config: AlignConfig, depth: int, mixers: Mixer
) -> optax.GradientTransformation:
    """Clips each layer by its own norm; or, as published, the mean's gradient by its norm."""
    if config.clip == "global":
        return optax.chain(
            optax.scale(1 / depth), make_optimizer(config.optimizer, config.steps, mixers)
        )
    unclipped = dataclasses.replace(config.optimizer, clip=0.0)
    rule = make_optimizer(unclipped, config.steps, mixers)
    clip = config.optimizer.clip
    return optax.chain(clip_by_layer_norm(clip), rule) if clip > 0 else rule


def clip_by_layer_norm(limit: float) -> optax.GradientTransformation:
    """Scales each layer of stacked gradients, the first axis, to a norm of at most `limit`."""

    def update(updates, state, params=None):
        norms = layer_norms(updates)
        scale = jnp.minimum(1.0, limit / jnp.maximum(norms, 1e-30))
        clip = lambda g: g * scale.reshape(-1, *(1,) * (g.ndim - 1))
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_norms(gradients: Mixer) -> Float[Array, " L"]:
    squares: Callable = lambda g: jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim)))
    return jnp.sqrt(sum(map(squares, jax.tree.leaves(gradients))))
