"""The ends of an attention-like mixer: queries, keys and values in, a gated output out."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.layers.linear import Linear, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.position import frequencies, rotary_angles, rotate


class QKV(nnx.Module):
    """Projections to heads, normalised per head (arXiv 2010.04245, without its scale), rotated."""

    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: bool,
        theta: float,
        norm: bool,
        eps: float,
        rope_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
        bias: bool = False,
    ):
        """`rope_dim`: how many of the first dimensions of a head are rotated; None: all."""
        self.head_dim, self.rope, self.interleaved = head_dim, rope, rope_interleaved
        self.rotary = (rope_dim or head_dim, theta, tuple(sorted((rope_scaling or {}).items())))
        if rope:
            frequencies(*self.rotary)  # refuses what cannot be
        if (rope_dim or 0) > head_dim:
            raise UserError(f"rope_dim is {rope_dim}: it must be at most head_dim = {head_dim}")
        axes, kv_inner = ("embed", "heads"), kv_heads * head_dim
        keys = jax.random.split(key, 3)
        self.query = Linear((width, heads * head_dim), axes, keys[0], bias=bias)
        self.key = Linear((width, kv_inner), axes, keys[1], bias=bias)
        self.value = Linear((width, kv_inner), axes, keys[2], bias=bias)
        self.query_norm = RMSNorm(head_dim, eps=eps) if norm else None
        self.key_norm = RMSNorm(head_dim, eps=eps) if norm else None

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        projections = (self.query, self.key, self.value)
        q, k, v = (split_heads(project(x), self.head_dim) for project in projections)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope:
            angles = rotary_angles(positions, *self.rotary)
            q, k = rotate(q, angles, self.interleaved), rotate(k, angles, self.interleaved)
        return q, k, v


class GatedOutput(Linear):
    """`(o * sigmoid(x W_gate)) W`, from heads back to the stream; the gate is optional."""

    def __init__(self, inner: int, width: int, key: jax.Array, *, gate: bool):
        keys = jax.random.split(key)
        super().__init__((inner, width), ("heads", "embed"), keys[0])
        self.gate = Linear((width, inner), ("embed", "heads"), keys[1]) if gate else None

    def __call__(self, o: Float[Array, "B T HK"], x: Float[Array, "B T D"]):
        if self.gate is not None:
            o = o * jax.nn.sigmoid(self.gate(x))
        return super().__call__(o)
