"""Blocks that share values, as one mixer: how publishers and readers meet the laws."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from hybridjax.config import BlockConfig, typed
from hybridjax.mixers.base import Mixer, new_length, state, state_field
from hybridjax.models.block import Block


@state
class StackState:
    layers: Any
    length: Int[Array, " B"] = state_field("batch")


class Stack(Mixer):
    """What the blocks add to the stream."""

    def __init__(self, width: int, key: jax.Array, *, blocks):
        keys = jax.random.split(key, len(blocks))
        configs = [typed(config, BlockConfig) for config in blocks]
        self.blocks = nnx.List(
            [Block(c, width, k, depth=1, norm_eps=1e-6) for c, k in zip(configs, keys)]
        )

    @property
    def align(self):
        return max(block.align for block in self.blocks)

    def __call__(self, x, ctx):
        h = x
        for block in self.blocks:
            h, ctx = block(h, ctx)
        return h - x

    def init_state(self, batch, max_length, dtype):
        layers = [block.init_state(batch, max_length, dtype) for block in self.blocks]
        return StackState(layers, jnp.zeros(batch, jnp.int32))

    def extend(self, x, state, ctx):
        h, layers = x, []
        for block, states in zip(self.blocks, state.layers):
            h, states, ctx = block.extend(h, states, ctx)
            layers.append(states)
        return h - x, StackState(layers, new_length(state.length, ctx))
