"""Landmark attention: a chunk of the past weighs what its landmark weighs.

Landmark Attention (arXiv 2305.16300), section 3.1: with a landmark key l_n for every chunk n of C
tokens, one softmax runs over the landmarks of past chunks and the tokens of the query's own chunk;
what a landmark gets is shared out among its chunk's tokens by a softmax over them (the grouped
softmax), and the landmark itself has no value. Trained on all chunks, a model can read few: those
with the highest landmarks.

In the paper a landmark is a token of its own in the text. Here text stays as it is: the last token
of a chunk, which has seen all of it in the layers below, has a projection more, for the landmark,
and is else a token like the others. Positions are the tokens' own also where chunks are chosen.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.layers.linear import Linear, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.position import rotary_angles, rotate
from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context
from hybridjax.mixers.pooled_attention import PooledAttention
from hybridjax.mixers.pooled_cache import Past
from pallas_kernels.selection import in_tiles, tile_size


class Landmark(PooledAttention):
    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        chunk_size: int,
        top_k: int | None = None,
        rope: bool = True,
        theta: float = 10_000.0,
        gate: bool = True,
        eps: float = 1e-6,
    ):
        """`top_k`: chunks before its own that a query and head reads; None: all, as in training."""
        if min(chunk_size, top_k or 1) < 1:
            raise UserError(f"chunk_size is {chunk_size}, top_k {top_k}: both must be at least 1")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.chunk_size, self.top_k, self.pooled_dim = chunk_size, top_k, head_dim
        keys = jax.random.split(key, 3)
        self.qkv = QKV(
            width, keys[0], heads=heads, kv_heads=self.kv_heads, head_dim=head_dim, rope=rope,
            theta=theta, norm=True, eps=eps,
        )  # fmt: skip
        self.landmark = Linear((width, self.kv_heads * head_dim), ("embed", "heads"), keys[1])
        self.landmark_norm = RMSNorm(head_dim, eps=eps)
        self.output = GatedOutput(heads * head_dim, width, keys[2], gate=gate)

    def _pooled(self, x, k, v, ctx: Context) -> Float[Array, "B T G K"]:
        """Of the last tokens of chunks, 0 for the others: so a chunk's sum is its landmark."""
        landmarks = self.landmark_norm(split_heads(self.landmark(x), self.head_dim))
        if self.qkv.rope:
            landmarks = rotate(landmarks, rotary_angles(ctx.positions, *self.qkv.rotary))
        last = ctx.positions % self.chunk_size == self.chunk_size - 1
        return jnp.where(last[..., None, None], landmarks, 0)

    def _attend(self, queries, index, segments, past: Past) -> Float[Array, "B T H K"]:
        return grouped_softmax_attention(
            *queries, *past[:3], index, segments, past.segments[:, :: self.chunk_size],
            top_k=self.top_k,
        )  # fmt: skip


def grouped_softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B N*C G K"],
    v: Float[Array, "B N*C G K"],
    landmarks: Float[Array, "B N G K"],
    index: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    chunk_segments: Int[Array, "B N"],
    *,
    top_k: int | None,
) -> Float[Array, "B T H K"]:
    """The grouped softmax in f32, never more than a tile of weights at once."""
    (B, _, H, K), (N, G) = q.shape, landmarks.shape[1:3]
    dot = lambda how, x, y: jnp.einsum(how, x, y, preferred_element_type=jnp.float32)
    chunks = lambda x: x.reshape(B, N, -1, G, K)
    k, v, landmarks = chunks(k), chunks(v), landmarks.astype(q.dtype)
    place = np.arange(k.shape[1] * k.shape[2]).reshape(N, -1)

    @jax.checkpoint
    def tile(q, index, segments):
        q = K**-0.5 * q.reshape(*q.shape[:2], G, H // G, K)
        same = (segments[..., None] == chunk_segments[:, None]) & (segments > 0)[..., None]
        seen = same[..., None] & (place <= index[..., None, None])
        past = same & (place[:, -1] < index[..., None])
        own = seen & ~past[..., None]

        tokens = dot("btgrk,bncgk->btgrnc", q, k)
        scores = dot("btgrk,bngk->btgrn", q, landmarks)
        scores = jnp.where(past[:, :, None, None], scores, -jnp.inf)
        if top_k is not None and top_k < N:
            lowest = jax.lax.top_k(scores, top_k)[0][..., -1:]
            scores = jnp.where(scores >= lowest, scores, -jnp.inf)
        local = jnp.where(own[:, :, None, None], tokens, -jnp.inf)
        largest = jnp.maximum(scores.max(-1), local.max((-2, -1)))[..., None]
        largest = jax.lax.stop_gradient(jnp.maximum(largest, -1e30))
        chunk, local = jnp.exp(scores - largest), jnp.exp(local - largest[..., None])
        total = chunk.sum(-1) + local.sum((-2, -1))
        weights = chunk[..., None] * jax.nn.softmax(tokens) + local
        weights = weights / jnp.maximum(total, 1e-30)[..., None, None]
        o = dot("btgrnc,bncgk->btgrk", weights.astype(v.dtype), v)
        return o.reshape(*o.shape[:2], H, K).astype(v.dtype)

    return in_tiles(tile, tile_size() // (B * H * place.size), q, index, segments)
