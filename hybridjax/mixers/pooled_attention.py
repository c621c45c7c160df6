"""Attention that judges each chunk of its past by a sum over the chunk's tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context, Mixer
from hybridjax.mixers.pooled_cache import Past, PooledCache, past_of_row
from hybridjax.sharding import context_axis, over_mesh, ways


class PooledAttention(Mixer):
    """A subclass makes what is named here, says what is summed, and attends to a `Past`."""

    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    pooled_dim: int  # P, the width of what is summed
    qkv: QKV
    output: GatedOutput

    def _pooled(self, x, k, v, ctx: Context) -> Float[Array, "B T G P"]:
        raise NotImplementedError

    def _queries(self, x, q: Float[Array, "B T H K"]) -> tuple[Float[Array, "B T H _"], ...]:
        """What `_attend` needs of each query and head."""
        return (q,)

    def _attend(
        self, queries, index: Int[Array, "B T"], segments: Int[Array, "B T"], past: Past
    ) -> Float[Array, "B T H K"]:
        """`index`: where in the row the queries stand. Runs on a device's own rows and heads."""
        raise NotImplementedError

    @property
    def align(self) -> int:
        return self.chunk_size

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        q, k, v = self.qkv(x, ctx.positions)
        past = past_of_row(k, v, self._pooled(x, k, v, ctx), ctx.segments, self.chunk_size)
        return self._read(x, q, past, ctx, "length")

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> PooledCache:
        sizes = max_length, self.chunk_size, self.kv_heads, self.head_dim, self.pooled_dim
        return PooledCache.empty(batch, *sizes, dtype)

    def extend(self, x: Float[Array, "B T D"], state: PooledCache, ctx: Context):
        q, k, v = self.qkv(x, ctx.positions)
        start, state = state.length, state.append(k, v, self._pooled(x, k, v, ctx), ctx)
        return self._read(x, q, state.past(start), ctx, None), state

    def _read(self, x, q, past: Past, ctx: Context, rows: str | None) -> Float[Array, "B T D"]:
        """`rows`: the logical axis of q's tokens."""
        axis = context_axis(q.shape[1]) if rows else None

        def attend(segments, keys, values, sums, documents, start, *queries):
            T = segments.shape[1]
            start = start if axis is None else start + T * jax.lax.axis_index(axis)
            past = Past(keys, values, sums, documents, start)
            return self._attend(queries, start[:, None] + jnp.arange(T), segments, past)

        heads = "heads" if self.kv_heads % ways("heads") == 0 else None
        in_queries, whole = ("batch", rows, heads, None), ("batch", None, heads, None)
        queries = self._queries(x, q)
        in_axes = (in_queries[:2], whole, whole, whole, whole[:2], ("batch",))
        in_axes += (in_queries,) * len(queries)
        o = over_mesh(attend, in_axes, (in_queries, q.shape))(ctx.segments, *past, *queries)
        return self.output(o.reshape(*q.shape[:2], -1), x)
