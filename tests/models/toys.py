"""Mixers as small as the contract allows, which share values in every way that it allows."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.mixers.base import Mixer, new_length, place_state, state, state_field


@state
class Seen:
    """All inputs, and how many there are."""

    values: Float[Array, "B S D"] = state_field("batch", None, None)
    length: Int[Array, " B"] = state_field("batch")

    def append(self, x, ctx):
        index = self.length[:, None] + jnp.arange(x.shape[1])
        index = jnp.where(ctx.segments > 0, index, self.values.shape[1])
        rows = jnp.arange(x.shape[0])[:, None]
        values = self.values.at[rows, index].set(x, mode="drop")
        return Seen(values, new_length(self.length, ctx))


@state
class Length:
    length: Int[Array, " B"] = state_field("batch")


class Toy(Mixer):
    """One matrix, and a state that only counts."""

    def __init__(self, width: int, key: jax.Array):
        kernel = jax.random.normal(key, (width, width)) * width**-0.5
        self.kernel = nnx.Param(kernel, axes=("embed", None))

    def init_state(self, batch, max_length, dtype):
        return place_state(Length(jnp.zeros(batch, jnp.int32)))

class Remembering(Toy):
    """A toy that keeps its inputs: both forms are `mix(x, seen, ctx)`."""

    def __call__(self, x, ctx):
        return self.mix(x, x, ctx)

    def init_state(self, batch, max_length, dtype):
        values = jnp.zeros((batch, max_length, self.kernel.shape[0]), dtype)
        return place_state(Seen(values, jnp.zeros(batch, jnp.int32)))

    def extend(self, x, state, ctx):
        state = state.append(x, ctx)
        out = self.mix(x, state.values, ctx)
        return (out[0], state, out[1]) if self.publishes else (out, state)


def _visible(ctx, length):
    """Which of `length` tokens, one document, each query sees: [B, T, S]."""
    return jnp.arange(length) <= ctx.positions[..., None]


@state
class Total:
    total: Float[Array, "B D"] = state_field("batch", None)
    length: Int[Array, " B"] = state_field("batch")


class Mean(Toy):
    """The mean of the tokens so far."""

    def __call__(self, x, ctx):
        return jnp.cumsum(x, axis=1) / (1 + ctx.positions[..., None]) @ self.kernel[...]

    def init_state(self, batch, max_length, dtype):
        total = jnp.zeros((batch, self.kernel.shape[0]))
        return place_state(Total(total, jnp.zeros(batch, jnp.int32)))

    def extend(self, x, state, ctx):
        sums = state.total[:, None] + jnp.cumsum(x * (ctx.segments > 0)[..., None], axis=1)
        y = sums / (1 + ctx.positions[..., None]) @ self.kernel[...]
        return y, Total(sums[:, -1], new_length(state.length, ctx))


class Encoder(Remembering):
    """Publishes a memory and adds nothing; its cache is the only one of the memory."""

    publishes = ("memory",)
    adds = False

    def mix(self, x, seen, ctx):
        return None, {"memory": seen @ self.kernel[...]}


class Reader(Toy):
    """Attends to the memory, and publishes with what weights."""

    reads = ("memory",)
    publishes = ("selection",)

    def __call__(self, x, ctx):
        memory = ctx.shared["memory"]
        scores = jnp.einsum("btd,bsd->bts", x @ self.kernel[...], memory)
        visible = _visible(ctx, memory.shape[1])
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return weights @ memory, {"selection": weights}

    def extend(self, x, state, ctx):
        y, published = self(x, ctx)
        return y, Length(new_length(state.length, ctx)), published


class Follower(Toy):
    """Attends to the memory with the weights of the nearest reader."""

    reads = ("memory", "selection")

    def __call__(self, x, ctx):
        return x * (ctx.shared["selection"] @ ctx.shared["memory"] @ self.kernel[...])

    def extend(self, x, state, ctx):
        return self(x, ctx), Length(new_length(state.length, ctx))


class Indexer(Remembering):
    """Each token's most similar token so far, as an index that followers share."""

    publishes = ("indices",)

    def mix(self, x, seen, ctx):
        scores = jnp.where(_visible(ctx, seen.shape[1]), jnp.einsum("btd,bsd->bts", x, seen), -1e9)
        indices = jnp.argmax(scores, axis=-1)
        return _taken(seen, indices) @ self.kernel[...], {"indices": indices}


class Sharer(Remembering):
    """Reads its own inputs at the nearest indexer's indices."""

    reads = ("indices",)

    def mix(self, x, seen, ctx):
        return _taken(seen, ctx.shared["indices"]) @ self.kernel[...]


def _taken(seen, indices):
    return jnp.take_along_axis(seen, indices[..., None], axis=1)
