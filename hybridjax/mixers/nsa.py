"""Native sparse attention: three views of the past, each with a gate of its own.

Native Sparse Attention (arXiv 2502.11089), eq. 5, with gates g = sigmoid(x_t W) per head:

    o_t = g_cmp attention(q_t, means of chunks) + g_slc attention(q_t, tokens of chosen chunks)
        + g_win attention(q_t, the last `window` tokens)

Chosen are the chunk in which the query stands and those before it to which the first view gives
the most weight, summed over the query heads of a K/V head (eq. 8-10), which so share a choice. As
in flash-linear-attention, chunks neither overlap nor differ between the views, a chunk is
summarised by the mean of its keys and values, and the views share their projections.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.layers.linear import Linear, split_heads
from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context, Mixer
from hybridjax.mixers.pooled_cache import Past, PooledCache, past_of_row
from hybridjax.sharding import context_axis, over_mesh, ways
from pallas_kernels.attention import attention
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
from pallas_kernels.selection import in_tiles, tile_size


class NSA(Mixer):
    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        chunk_size: int,
        top_k: int,
        window: int,
        rope: bool = True,
        theta: float = 10_000.0,
        qk_norm: bool = True,
        gate: bool = False,
        eps: float = 1e-6,
    ):
        """Args:
        top_k: chunks per query and K/V head, the query's own included.
        window: the number of keys that the third view sees, the query's own included.
        gate: the output's, besides those of the views.
        """
        if min(chunk_size, top_k, window) < 1:
            raise UserError(
                f"chunk_size is {chunk_size}, top_k {top_k}, window {window}: at least 1 each"
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.chunk_size, self.top_k, self.window = chunk_size, top_k, window
        keys = jax.random.split(key, 3)
        self.qkv = QKV(
            width, keys[0], heads=heads, kv_heads=self.kv_heads, head_dim=head_dim, rope=rope,
            theta=theta, norm=qk_norm, eps=eps,
        )  # fmt: skip
        self.views = Linear((width, 3 * heads), ("embed", "heads"), keys[1])
        self.output = GatedOutput(heads * head_dim, width, keys[2], gate=gate)

    @property
    def align(self) -> int:
        return self.chunk_size

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        q, k, v = self.qkv(x, ctx.positions)
        pooled = jnp.concatenate([k, v], axis=-1)
        past = past_of_row(k, v, pooled, ctx.segments, self.chunk_size)
        return self.output(self._read(x, q, past, ctx, "length"), x)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> PooledCache:
        return PooledCache.empty(
            batch, max_length, self.chunk_size, self.kv_heads, self.head_dim, 2 * self.head_dim,
            dtype,
        )  # fmt: skip

    def extend(self, x: Float[Array, "B T D"], state: PooledCache, ctx: Context):
        q, k, v = self.qkv(x, ctx.positions)
        start, state = state.length, state.append(k, v, jnp.concatenate([k, v], axis=-1), ctx)
        return self.output(self._read(x, q, state.past(start), ctx, None), x), state

    def _read(self, x, q, past: Past, ctx: Context, rows: str | None) -> Float[Array, "B T HK"]:
        """`rows`: the logical axis of q's tokens."""
        gates = split_heads(jax.nn.sigmoid(self.views(x)), 3)
        axis = context_axis(q.shape[1]) if rows else None

        def attend(q, gates, keys, values, sums, segments, documents, start):
            if axis is not None:
                start = start + q.shape[1] * jax.lax.axis_index(axis)
            past = Past(keys, values, sums, documents, start)
            index = start[:, None] + jnp.arange(q.shape[1])
            views = (
                self._compressed(q, index, segments, past),
                self._selected(q, index, segments, past),
                self._recent(q, index, segments, past),
            )
            return sum(gates[..., i, None] * view for i, view in enumerate(views))

        heads = "heads" if self.kv_heads % ways("heads") == 0 else None
        queries, whole = ("batch", rows, heads, None), ("batch", None, heads, None)
        in_axes = (queries, queries, whole, whole, whole, queries[:2], whole[:2], ("batch",))
        o = over_mesh(attend, in_axes, (queries, q.shape))(
            q, gates, *past[:3], ctx.segments, past.segments, past.start
        )
        return o.reshape(*q.shape[:2], -1)

    def _compressed(self, q, index, segments, past: Past) -> Float[Array, "B T H K"]:
        means = (past.sums / self.chunk_size).astype(past.keys.dtype)
        keys, values = jnp.split(means, 2, axis=-1)
        last = jnp.arange(1, keys.shape[1] + 1) * self.chunk_size - 1
        return attention(
            q, keys, values, q_index=index, k_index=jnp.broadcast_to(last, keys.shape[:2]),
            q_segments=segments, k_segments=past.segments[:, :: self.chunk_size],
        )  # fmt: skip

    def _selected(self, q, index, segments, past: Past) -> Float[Array, "B T H K"]:
        means = past.sums[..., : self.head_dim] / self.chunk_size
        chosen = chosen_chunks(
            *jax.lax.stop_gradient((q, means)), index, segments,
            past.segments[:, :: self.chunk_size], top_k=self.top_k, chunk_size=self.chunk_size,
        )  # fmt: skip
        return chunk_sparse_attention(
            q, past.keys, past.values, chosen, chunk_size=self.chunk_size, index=index
        )

    def _recent(self, q, index, segments, past: Past) -> Float[Array, "B T H K"]:
        """Of a cache much longer than the window only the end is looked at."""
        T, slots = q.shape[1], past.keys.shape[1]
        count = min(self.window - 1 + T, slots)
        first = jnp.clip(past.start - self.window + 1, 0, slots - count)
        cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, count))
        keys, values, documents = (cut(x, first) for x in (past.keys, past.values, past.segments))
        return attention(
            q, keys, values, window=self.window, q_index=index,
            k_index=first[:, None] + jnp.arange(count), q_segments=segments, k_segments=documents,
        )  # fmt: skip


def chosen_chunks(
    q: Float[Array, "B T H K"],
    means: Float[Array, "B N G K"],
    index: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    chunk_segments: Int[Array, "B N"],
    *,
    top_k: int,
    chunk_size: int,
) -> Int[Array, "B T G J"]:
    """The chunk of each query and those of its past with most weight, the latest first; -1: none.

    Of equal weights the later chunk's counts as higher. Never more than a tile of weights at once.
    """
    (B, _, H, K), (N, G) = q.shape, means.shape[1:3]
    ends = (np.arange(N) + 1) * chunk_size

    def tile(q, index, segments):
        q = q.reshape(*q.shape[:2], G, H // G, K)
        logits = jnp.einsum("btgrk,bngk->btgrn", q, means, preferred_element_type=jnp.float32)
        same = (segments[..., None] == chunk_segments[:, None]) & (segments > 0)[..., None]
        seen = (ends <= index[..., None] + 1) & same
        logits = jnp.where(seen[:, :, None, None], logits * K**-0.5, -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
        weights = jnp.exp(logits - largest)
        weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
        past = seen & (ends <= index[..., None])
        weights = jnp.where(past[:, :, None], jnp.sum(weights, axis=3), -1)
        best, chosen = jax.lax.top_k(weights[..., ::-1], min(top_k - 1, N))
        chosen = jnp.where(best < 0, -1, N - 1 - chosen)
        own = jnp.where(segments > 0, index // chunk_size, -1)
        own = jnp.broadcast_to(own[..., None, None], (*chosen.shape[:3], 1))
        return jnp.concatenate([own, -jnp.sort(-chosen, axis=-1)], axis=-1)

    return in_tiles(tile, tile_size() // (B * H * N), q, index, segments)
