"""Mixture of Block Attention: each query attends to few chunks, of which its own is always one.

MoBA (arXiv 2502.13189), section 2.2: chunk n of C tokens scores the inner product of the query with
the mean of its keys (eq. 6); every query head takes the chunk in which the query stands and the
best of those before it, J together, and has one softmax over the tokens of all of them that do not
come after it. Choosing has no parameters and no gradient. Positions are rotary, as the keys' are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridjax.config import UserError
from hybridjax.layers.linear import repeat_heads
from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context, Mixer
from hybridjax.mixers.pooled_cache import Past, PooledCache, past_of_row
from hybridjax.sharding import context_axis, over_mesh
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
from pallas_kernels.chunk_topk import chunk_topk


class MoBA(Mixer):
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
        rope: bool = True,
        theta: float = 10_000.0,
        qk_norm: bool = True,
        gate: bool = True,
        eps: float = 1e-6,
    ):
        """`top_k`: chunks per query and head, its own included."""
        if min(chunk_size, top_k) < 1:
            raise UserError(f"chunk_size is {chunk_size}, top_k {top_k}: both must be at least 1")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.chunk_size, self.top_k = chunk_size, top_k
        qkv_key, output_key = jax.random.split(key)
        self.qkv = QKV(
            width, qkv_key, heads=heads, kv_heads=self.kv_heads, head_dim=head_dim, rope=rope,
            theta=theta, norm=qk_norm, eps=eps,
        )  # fmt: skip
        self.output = GatedOutput(heads * head_dim, width, output_key, gate=gate)

    @property
    def align(self) -> int:
        return self.chunk_size

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        q, k, v = self.qkv(x, ctx.positions)
        past = past_of_row(k, v, k, ctx.segments, self.chunk_size)
        return self.output(self._read(q, past, ctx, "length"), x)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> PooledCache:
        return PooledCache.empty(
            batch, max_length, self.chunk_size, self.kv_heads, self.head_dim, self.head_dim, dtype
        )

    def extend(self, x: Float[Array, "B T D"], state: PooledCache, ctx: Context):
        q, k, v = self.qkv(x, ctx.positions)
        start, state = state.length, state.append(k, v, k, ctx)
        return self.output(self._read(q, state.past(start), ctx, None), x), state

    def _read(self, q, past: Past, ctx: Context, rows: str | None) -> Float[Array, "B T HK"]:
        """`rows`: the logical axis of q's tokens."""
        C, group = self.chunk_size, self.heads // self.kv_heads
        keys, values, sums = (repeat_heads(x, group) for x in past[:3])
        axis = context_axis(q.shape[1]) if rows else None

        def attend(q, keys, values, sums, segments, documents, start):
            T = q.shape[1]
            if axis is not None:
                start = start + T * jax.lax.axis_index(axis)
            index = start[:, None] + jnp.arange(T)
            own = jnp.where(segments > 0, index // C, -1)
            chosen = jnp.broadcast_to(own[..., None, None], (*q.shape[:3], 1))
            if self.top_k > 1:
                gate, means = jax.lax.stop_gradient((q, sums / C))
                best, _ = chunk_topk(
                    gate.astype(means.dtype), means, k=self.top_k - 1,
                    chunk_size=C, segments=segments, chunk_segments=documents[:, ::C], start=start,
                )  # fmt: skip
                chosen = jnp.concatenate([chosen, best], axis=-1)
            return chunk_sparse_attention(q, keys, values, chosen, chunk_size=C, index=index)

        queries, whole = ("batch", rows, "heads", None), ("batch", None, "heads", None)
        in_axes = (queries, whole, whole, whole, ("batch", rows), ("batch", None), ("batch",))
        o = over_mesh(attend, in_axes, (queries, q.shape))(
            q, keys, values, sums, ctx.segments, past.segments, past.start
        )
        return o.reshape(*q.shape[:2], -1)
