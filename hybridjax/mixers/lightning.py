"""Lightning attention: linear attention with a constant decay per head.

HypeNet's form (arXiv 2601.22156, eq. 18-19): with q, k normalised per head, then rotated,

    S_t = exp(-s_h) S_{t-1} + k_t^T v_t,    o_t = q_t S_t / sqrt(K),
    y_t = (norm(o_t) * sigmoid(x_t W_gate)) W_output

where norm spans all heads and s_h are the ALiBi slopes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import repeat_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context, Mixer, new_length, place_state, state, state_field
from hybridjax.sharding import context_axis, over_mesh
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
        qkv_key, output_key = jax.random.split(key)
        self.qkv = QKV(
            width, qkv_key, heads=heads, kv_heads=self.kv_heads, head_dim=head_dim,
            rope=rope, theta=theta, norm=qk_norm, eps=eps,
        )  # fmt: skip
        inner = heads * head_dim
        self.output_norm = RMSNorm(inner, eps=eps, axis="heads") if output_norm else None
        self.output = GatedOutput(inner, width, output_key, gate=gate)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        return self._mix(x, None, ctx)[0]

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> LightningState:
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return place_state(LightningState(jnp.zeros(shape), jnp.zeros(batch, jnp.int32)))

    def extend(self, x: Float[Array, "B T D"], state: LightningState, ctx: Context):
        y, recurrent = self._mix(x, state.recurrent, ctx)
        return y, LightningState(recurrent, new_length(state.length, ctx))

    def _mix(self, x, initial_state, ctx):
        q, k, v = self.qkv(x, ctx.positions)
        group = self.heads // self.kv_heads
        k, v = repeat_heads(k, group), repeat_heads(v, group)
        in_heads, in_state = ("batch", "length", "heads", None), ("batch", "heads", None, None)
        axis = context_axis(x.shape[1])
        state_shape = (x.shape[0], self.heads, self.head_dim, self.head_dim)

        def kernel(q, k, v, decay, segments, initial_state):
            return linear_attention(
                q, k, v, decay, segments=segments, initial_state=initial_state,
                output_final_state=True, context_axis=axis,
            )  # fmt: skip

        o, final_state = over_mesh(
            kernel,
            in_axes=(in_heads,) * 3 + (("heads",), ("batch", "length"), in_state),
            out_axes=((in_heads, q.shape), (in_state, state_shape)),
        )(q, k, v, -alibi_slopes(self.heads), ctx.segments, initial_state)

        o = o.reshape(*x.shape[:2], -1)
        if self.output_norm is not None:
            o = self.output_norm(o)
        return self.output(o, x), final_state
