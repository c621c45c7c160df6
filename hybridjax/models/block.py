"""The residual block: one letter of the stack."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hybridjax.config import BlockConfig, UserError, build
from hybridjax.layers.mlp import MLPS
from hybridjax.layers.norm import RMSNorm
from hybridjax.mixers import MIXERS
from hybridjax.mixers.base import Context
from hybridjax.models.plan import Letter


def block(
    *mixers: ConfigDict,
    mlp: ConfigDict | None = None,
    residual: str = "standard",
    norms: str = "pre",
    scale: float = 1.0,
) -> ConfigDict:
    """A letter's entry in the legend; the meaning of each option is in `BlockConfig`."""
    return ConfigDict(
        dict(mixers=tuple(mixers), mlp=mlp, residual=residual, norms=norms, scale=scale)
    )


class Block(nnx.Module):
    """`h + mixer(norm(h))` for each mixer, then `h + mlp(norm(h))`.

    With `residual="bypass"` the last mixer's output m reaches the stream through the MLP alone:
    `h + mlp(norm(h + m))` (arXiv 2510.17196, eq. 6b).
    """

    def __init__(
        self, config: BlockConfig, width: int, key: jax.Array, *, depth: int, norm_eps: float
    ):
        """`depth`: the number of layers; branches start smaller by 1 / sqrt(2 depth)."""
        for name, known in (("residual", ("standard", "bypass")), ("norms", ("pre", "sandwich"))):
            if getattr(config, name) not in known:
                raise UserError(f"block {name} is {getattr(config, name)!r}: use one of {known}")
        *mixer_keys, mlp_key = jax.random.split(key, len(config.mixers) + 1)
        parts = [
            build(spec, MIXERS, width, key)
            for spec, key in zip(config.mixers, mixer_keys, strict=True)
        ]
        adding = [m for m in parts if m.adds]
        if config.residual == "bypass" and (config.mlp is None or not adding):
            raise UserError("a bypass block needs a mixer that adds to the stream, and an MLP")
        self.residual, self.scale = config.residual, config.scale
        self.mixers = nnx.List(parts)
        self.mlp = None if config.mlp is None else build(config.mlp, MLPS, width, mlp_key)
        norm = lambda: RMSNorm(width, eps=norm_eps)
        branches = len(parts) + (self.mlp is not None)
        self.norms = nnx.List([norm() for _ in range(branches)])
        sandwich = branches if config.norms == "sandwich" else 0
        self.output_norms = nnx.List([norm() for _ in range(sandwich)])
        for part in [*parts, *([self.mlp] if self.mlp else [])]:
            if hasattr(part, "output"):
                part.output.kernel[...] *= (2 * depth) ** -0.5

    @property
    def letter(self) -> Letter:
        """Its interface to other layers: what the planner reads."""
        own, reads = [], []
        for mixer in self.mixers:
            reads += [name for name in mixer.reads if name not in own]
            own += mixer.publishes
        counted = self.mlp is not None or any(m.adds for m in self.mixers)
        bounds = [m.reach for m in self.mixers if m.adds and not m.reads]
        window = None if None in bounds or not bounds else 1 + max(bounds)
        return Letter(tuple(own), tuple(reads), counted, self.align, window)

    @property
    def align(self) -> int:
        return max((m.align for m in self.mixers), default=1)

    @property
    def reach(self) -> int | None:
        """Tokens before its own on which a token depends; None: all."""
        reaches = [m.reach for m in self.mixers]
        return None if None in reaches else sum(reaches)

    def __call__(
        self, h: Float[Array, "B T D"], ctx: Context, data: Any = None
    ) -> tuple[Float[Array, "B T D"], Context]:
        """The stream after this block, and the context with what it published.

        `data`: this layer's part of what the fold was given per layer; handed to the mixers.
        """
        given = () if data is None else (data,)

        def run(mixer, x, ctx, _):
            out = mixer(x, ctx, *given)
            y, published = out if mixer.publishes else (out, {})
            return y, None, published

        h, ctx, _ = self.residuals(run, h, ctx, [None] * len(self.mixers))
        return h, ctx

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> tuple:
        return tuple(m.init_state(batch, max_length, dtype) for m in self.mixers)

    def extend(
        self, h: Float[Array, "B T D"], states: tuple, ctx: Context
    ) -> tuple[Float[Array, "B T D"], tuple, Context]:
        def run(mixer, x, ctx, state):
            y, state, *published = mixer.extend(x, state, ctx)
            return y, state, published[0] if published else {}

        h, ctx, states = self.residuals(run, h, ctx, states)
        return h, tuple(states), ctx

    def residuals(
        self, run: Callable, h: Float[Array, "B T D"], ctx: Context, states: Sequence
    ) -> tuple[Float[Array, "B T D"], Context, list]:
        """The block with each mixer run by `run(mixer, x, ctx, state) -> (y, state, published)`.

        `states`: one per mixer, whatever `run` wants; the new ones are returned.
        """
        norms, output_norms = iter(self.norms), iter(self.output_norms)

        def branch(y):
            y = next(output_norms)(y) if self.output_norms else y
            return y if self.scale == 1.0 else y * self.scale

        stream, new_states = h, []
        for mixer, state in zip(self.mixers, states, strict=True):
            stream = h  # before the last mixer: what a bypass block adds its MLP to
            y, state, published = run(mixer, next(norms)(h), ctx, state)
            ctx = ctx.publish(published) if published else ctx
            new_states.append(state)
            if y is not None:
                h = h + checkpoint_name(branch(y), "mixer")
        if self.mlp is not None:
            y = checkpoint_name(branch(self.mlp(next(norms)(h))), "mlp")
            h = (stream if self.residual == "bypass" else h) + y
        return h, ctx, new_states
