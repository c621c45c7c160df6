"""The ends of an attention-like mixer: queries, keys and values in, a gated output out."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import Linear, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.position import rotary_angles, rotate


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
    ):
        self.head_dim, self.rope, self.theta = head_dim, rope, theta
        axes, kv_inner = ("embed", "heads"), kv_heads * head_dim
        keys = jax.random.split(key, 3)
        self.query = Linear((width, heads * head_dim), axes, keys[0])
        self.key = Linear((width, kv_inner), axes, keys[1])
        self.value = Linear((width, kv_inner), axes, keys[2])
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
            angles = rotary_angles(positions, self.head_dim, self.theta)
            q, k = rotate(q, angles), rotate(k, angles)
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
