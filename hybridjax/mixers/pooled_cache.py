"""Keys and values, with a sum over each chunk of them by which the chunk is judged."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import place_heads
from hybridjax.mixers.base import Context, new_length, place_state, state, state_field
from hybridjax.sharding import over_mesh, place

_HEADS = ("batch", None, "heads", None)


class Past(NamedTuple):
    """N chunks of C tokens, whole on every device of the context axis.

    A chunk's sum is meant for tokens from its last one on: before, it is that of a part.
    """

    keys: Float[Array, "B N*C G K"]
    values: Float[Array, "B N*C G K"]
    sums: Float[Array, "B N G P"]  # in f32
    segments: Int[Array, "B N*C"]  # the document of each token; 0: there is none
    start: Int[Array, " B"]  # tokens of the row before the queries


def past_of_row(
    k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], pooled: Float[Array, "B T G P"],
    segments: Int[Array, "B T"], chunk_size: int,
) -> Past:  # fmt: skip
    """Of a whole row, whose documents begin on the grid of chunks; its last chunk is filled up."""

    def whole(x):
        x = place_heads(x) if x.ndim == 4 else place(x, "batch", None)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk_size), *[(0, 0)] * (x.ndim - 2)))

    k, v, pooled, segments = (whole(x) for x in (k, v, pooled, segments))
    chunks = pooled.reshape(pooled.shape[0], -1, chunk_size, *pooled.shape[2:])
    sums = jnp.sum(chunks, axis=2, dtype=jnp.float32)
    start = place(jnp.zeros(k.shape[0], jnp.int32), "batch")
    return Past(k, v, sums, segments, start)


@state
class PooledCache:
    """All keys and values, and sums over chunks: `2 B S G K` elements and `4 B N G P` bytes."""

    keys: Float[Array, "B S G K"] = state_field(*_HEADS)
    values: Float[Array, "B S G K"] = state_field(*_HEADS)
    sums: Float[Array, "B N G P"] = state_field(*_HEADS)
    length: Int[Array, " B"] = state_field("batch")

    @classmethod
    def empty(
        cls, batch: int, max_length: int, chunk_size: int, kv_heads: int, head_dim: int,
        pooled: int, dtype: jnp.dtype,
    ) -> "PooledCache":  # fmt: skip
        """`pooled`: the width of what is summed, P."""
        count = -(-max_length // chunk_size)
        cache = jnp.zeros((batch, count * chunk_size, kv_heads, head_dim), dtype)
        sums, length = jnp.zeros((batch, count, kv_heads, pooled)), jnp.zeros(batch, jnp.int32)
        return place_state(cls(cache, cache, sums, length))

    def append(
        self, k: Float[Array, "B T G K"], v: Float[Array, "B T G K"],
        pooled: Float[Array, "B T G P"], ctx: Context,
    ) -> "PooledCache":  # fmt: skip
        """Takes in the real tokens, behind each row's last."""
        slots, chunk_size = self.keys.shape[1], self.keys.shape[1] // self.sums.shape[1]
        at = self.length[:, None] + jnp.arange(k.shape[1])
        at = jnp.where(ctx.segments > 0, at, slots)  # padding: out of range

        def write(keys, values, sums, k, v, pooled, at):
            rows = jnp.arange(at.shape[0])[:, None]
            put = lambda cache, new: cache.at[rows, at].set(new.astype(cache.dtype), mode="drop")
            added = pooled.astype(sums.dtype)
            sums = sums.at[rows, at // chunk_size].add(added, mode="drop")
            return put(keys, k), put(values, v), sums

        caches = self.keys, self.values, self.sums
        out_axes = tuple((_HEADS, x.shape) for x in caches)
        write = over_mesh(write, (_HEADS,) * 6 + (("batch", None),), out_axes)
        return PooledCache(*write(*caches, k, v, pooled, at), new_length(self.length, ctx))

    def past(self, start: Int[Array, " B"]) -> Past:
        """What queries from token `start` on read."""
        segments = jnp.arange(self.keys.shape[1]) < self.length[:, None]
        return Past(self.keys, self.values, self.sums, segments.astype(jnp.int32), start)
