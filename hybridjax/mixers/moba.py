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
from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context
from hybridjax.mixers.pooled_attention import PooledAttention
from hybridjax.mixers.pooled_cache import Past
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
from pallas_kernels.chunk_topk import chunk_topk


class MoBA(PooledAttention):
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
        self.chunk_size, self.top_k, self.pooled_dim = chunk_size, top_k, head_dim
        qkv_key, output_key = jax.random.split(key)
        self.qkv = QKV(
            width, qkv_key, heads=heads, kv_heads=self.kv_heads, head_dim=head_dim, rope=rope,
            theta=theta, norm=qk_norm, eps=eps,
        )  # fmt: skip
        self.output = GatedOutput(heads * head_dim, width, output_key, gate=gate)

    def _pooled(self, x, k, v, ctx: Context) -> Float[Array, "B T G K"]:
        return k

    def _attend(self, queries, index, segments, past: Past) -> Float[Array, "B T H K"]:
        (q,), C = queries, self.chunk_size
        group = self.heads // self.kv_heads
        keys, values, sums = (jnp.repeat(x, group, axis=2) for x in past[:3])
        own = jnp.where(segments > 0, index // C, -1)
        chosen = jnp.broadcast_to(own[..., None, None], (*q.shape[:3], 1))
        if self.top_k > 1:
            gate, means = jax.lax.stop_gradient((q, sums / C))
            best, _ = chunk_topk(
                gate.astype(means.dtype), means, k=self.top_k - 1, chunk_size=C,
                segments=segments, chunk_segments=past.segments[:, ::C], start=past.start,
            )  # fmt: skip
            chosen = jnp.concatenate([chosen, best], axis=-1)
        return chunk_sparse_attention(q, keys, values, chosen, chunk_size=C, index=index)
