"""Lightning attention: linear attention with a constant decay per head.

HypeNet's form (arXiv 2601.22156, eq. 18-19): with q, k normalised per head, then rotated,

    S_t = exp(-s_h) S_{t-1} + k_t^T v_t,    o_t = q_t S_t / sqrt(K),
    y_t = (norm(o_t) * sigmoid(x_t W_gate)) W_output

where norm spans all heads and s_h are the ALiBi slopes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import Linear, repeat_heads, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.position import rotary_angles, rotate
from hybridjax.mixers.base import Context, Mixer, new_length, place_state, state, state_field
from hybridjax.sharding import over_mesh
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention.decay import alibi_slopes


@state
class LightningState:
    """`4 B H K V` bytes, whatever the length."""

    recurrent: Float[Array, "B H K V"] = state_field("batch", "heads", None, None)
    length: Int[Array, " B"] = state_field("batch")


class Lightning(Mixer):
    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        rope: bool = True,
        theta: float = 10_000.0,
        qk_norm: bool = True,
        gate: bool = True,
        output_norm: bool = True,
        eps: float = 1e-6,
    ):
        """`kv_heads` below `heads` shares each key/value head among heads / kv_heads query heads;
        the default is one each, to which HALO expands a grouped teacher."""
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.rope, self.theta = rope, theta
        inner, kv_inner = heads * head_dim, self.kv_heads * head_dim
        keys = jax.random.split(key, 5)
        self.query = Linear((width, inner), ("embed", "heads"), keys[0])
        self.key = Linear((width, kv_inner), ("embed", "heads"), keys[1])
        self.value = Linear((width, kv_inner), ("embed", "heads"), keys[2])
        self.gate = Linear((width, inner), ("embed", "heads"), keys[3]) if gate else None
        self.output = Linear((inner, width), ("heads", "embed"), keys[4])
        self.query_norm = RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.output_norm = RMSNorm(inner, eps=eps, axis="heads") if output_norm else None

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        return self._mix(x, None, ctx)[0]

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> LightningState:
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return place_state(LightningState(jnp.zeros(shape), jnp.zeros(batch, jnp.int32)))

    def extend(self, x: Float[Array, "B T D"], state: LightningState, ctx: Context):
        y, recurrent = self._mix(x, state.recurrent, ctx)
        return y, LightningState(recurrent, new_length(state.length, ctx))

    def _mix(self, x, initial_state, ctx):
        q, k, v = self._heads(x, ctx)
        in_heads, in_state = ("batch", None, "heads", None), ("batch", "heads", None, None)
        state_shape = (x.shape[0], self.heads, self.head_dim, self.head_dim)

        def kernel(q, k, v, decay, segments, initial_state):
            return linear_attention(
                q, k, v, decay, segments=segments, initial_state=initial_state,
                output_final_state=True,
            )  # fmt: skip

        o, final_state = over_mesh(
            kernel,
            in_axes=(in_heads,) * 3 + (("heads",), ("batch", None), in_state),
            out_axes=((in_heads, q.shape), (in_state, state_shape)),
        )(q, k, v, -alibi_slopes(self.heads), ctx.segments, initial_state)

        o = o.reshape(*x.shape[:2], -1)
        if self.output_norm is not None:
            o = self.output_norm(o)
        if self.gate is not None:
            o = o * jax.nn.sigmoid(self.gate(x))
        return self.output(o), final_state

    def _heads(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the recurrence: `[B, T, H, K]` each."""
        projections = (self.query, self.key, self.value)
        q, k, v = (split_heads(project(x), self.head_dim) for project in projections)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope:
            angles = rotary_angles(ctx.positions, self.head_dim, self.theta)
            q, k = rotate(q, angles), rotate(k, angles)
        group = self.heads // self.kv_heads
        return q, repeat_heads(k, group), repeat_heads(v, group)
