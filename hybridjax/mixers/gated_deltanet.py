"""Gated DeltaNet: a recurrent state in which a key's value is replaced, not added to.

Gated Delta Networks (arXiv 2412.06464), section 3.4, in the form of flash-linear-attention and
Qwen3-Next: q, k, v pass a short convolution and SiLU, q and k are normalised to length 1, and

    decay_t = -exp(A_log) softplus(x_t W_decay + dt_bias),   beta_t = sigmoid(x_t W_beta),
    S_t = R_t + k_t (beta_t (v_t - k_t R_t))^T  with  R_t = exp(decay_t) S_{t-1},
    y_t = (norm(q_t S_t / sqrt(K)) * silu(x_t W_gate)) W_output

where norm is over each head's values. There is a state per value head; fewer key heads are shared.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridjax.config import UserError
from hybridjax.layers.convolution import ShortConvolution
from hybridjax.layers.linear import Linear, repeat_heads, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.time_step import time_step_bias
from hybridjax.mixers.convolved import ConvolvedMixer
from hybridjax.sharding import context_axis, over_mesh, place, ways
from pallas_kernels.gated_delta_rule import gated_delta_rule


class GatedDeltaNet(ConvolvedMixer):
    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        value_heads: int | None = None,
        value_dim: int | None = None,
        convolution: int = 4,
        eps: float = 1e-6,
    ):
        """Args:
        heads: of queries and keys; `value_heads`, a multiple of them, defaults to as many.
        head_dim: width of a query or key; `value_dim`, of a value, defaults to the same.
        convolution: tokens that the short convolutions see, the own included.
        """
        self.heads, self.head_dim = heads, head_dim
        self.value_heads, self.value_dim = value_heads or heads, value_dim or head_dim
        if self.value_heads % heads:
            raise UserError(f"value_heads is {value_heads}: use a multiple of heads ({heads})")
        self.state_shape = self.value_heads, head_dim, self.value_dim
        inner, value_inner = heads * head_dim, self.value_heads * self.value_dim
        keys = iter(jax.random.split(key, 12))
        project = lambda size: Linear((width, size), ("embed", "heads"), next(keys))
        convolve = lambda size: ShortConvolution(size, convolution, next(keys))
        self.query, self.key, self.value = project(inner), project(inner), project(value_inner)
        self.query_convolution, self.key_convolution = convolve(inner), convolve(inner)
        self.value_convolution = convolve(value_inner)
        self.beta, self.decay = project(self.value_heads), project(self.value_heads)
        rate = jax.random.uniform(next(keys), self.value_heads, minval=1e-4, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rate), axes=("heads",))
        self.dt_bias = nnx.Param(time_step_bias(next(keys), self.value_heads), axes=("heads",))
        self.gate = project(value_inner)
        self.output_norm = RMSNorm(self.value_dim, eps=eps)
        self.output = Linear((value_inner, width), ("heads", "embed"), next(keys))

    def _read(self, x, q, k, v, recurrent, segments):
        q, k = split_heads(q, self.head_dim), split_heads(k, self.head_dim)
        v, gate = split_heads(v, self.value_dim), split_heads(self.gate(x), self.value_dim)
        o, recurrent = self._recur(q, k, v, *self._gates(x), segments, recurrent)
        o = self.output_norm(o) * jax.nn.silu(gate.astype(jnp.float32))
        return self.output(o.astype(x.dtype).reshape(*x.shape[:2], -1)), recurrent

    def _gates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        """beta and the log decay `[B, T, H]`, in f32."""
        parameter = lambda p: place(p[...], "heads")
        step = self.decay(x).astype(jnp.float32) + parameter(self.dt_bias)
        decay = -jnp.exp(parameter(self.A_log)) * jax.nn.softplus(step)
        return jax.nn.sigmoid(self.beta(x).astype(jnp.float32)), decay

    def _recur(self, q, k, v, beta, decay, segments, recurrent):
        if self.heads % ways("heads"):  # a device holds the keys that its values read
            group = self.value_heads // self.heads
            q, k = repeat_heads(q, group), repeat_heads(k, group)
        in_heads, in_state = ("batch", "length", "heads", None), ("batch", "heads", None, None)
        axis = context_axis(v.shape[1])
        state_shape = (v.shape[0], *self.state_shape)

        def kernel(q, k, v, beta, decay, segments, recurrent):
            return gated_delta_rule(
                q, k, v, beta, decay, segments=segments, initial_state=recurrent,
                l2_norm=True, output_final_state=True, context_axis=axis,
            )  # fmt: skip

        return over_mesh(
            kernel,
            in_axes=(in_heads,) * 3 + (in_heads[:3],) * 2 + (("batch", "length"), in_state),
            out_axes=((in_heads, v.shape), (in_state, state_shape)),
        )(q, k, v, beta, decay, segments, recurrent)
