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
from hybridjax.mixers.base import Context
from hybridjax.mixers.pooled_attention import PooledAttention
from hybridjax.mixers.pooled_cache import Past
from pallas_kernels.attention import attention
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
from pallas_kernels.selection import in_tiles, tile_size


class NSA(PooledAttention):
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
        self.pooled_dim = 2 * head_dim
        keys = jax.random.split(key, 3)
        self.qkv = QKV(
            width, keys[0], heads=heads, kv_heads=self.kv_heads, head_dim=head_dim, rope=rope,
            theta=theta, norm=qk_norm, eps=eps,
        )  # fmt: skip
        self.views = Linear((width, 3 * heads), ("embed", "heads"), keys[1])
        self.output = GatedOutput(heads * head_dim, width, keys[2], gate=gate)

    def _pooled(self, x, k, v, ctx: Context) -> Float[Array, "B T G 2*K"]:
        return jnp.concatenate([k, v], axis=-1)

    def _queries(self, x, q):
        return q, split_heads(jax.nn.sigmoid(self.views(x)), 3)

    def _attend(self, queries, index, segments, past: Past) -> Float[Array, "B T H K"]:
        q, gates = queries
        views = (
            self._compressed(q, index, segments, past),
            self._selected(q, index, segments, past),
            self._recent(q, index, segments, past),
        )
        return sum(gates[..., i, None] * view for i, view in enumerate(views))

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
