"""Mamba-2: a linear state that decays by a step size of the token's own.

Transformers are SSMs (arXiv 2405.21060), section 7 and figure 6, in the parallel form of the
released code: x, B and C pass a short convolution and SiLU, and for each head

    dt_t = softplus(u_t W_dt + dt_bias),    a_t = exp(-exp(A_log) dt_t),
    S_t = a_t S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t,
    out_t = norm(y_t * silu(u_t W_z)) W_output

where norm spans all heads, and B, C are shared by the heads of a group. In the words of linear
attention, which computes it, C is the query, B the key and x the value; so are they named here.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hybridjax.config import UserError
from hybridjax.layers.convolution import ShortConvolution
from hybridjax.layers.linear import Linear, repeat_heads, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.time_step import time_step_bias
from hybridjax.mixers.convolved import ConvolvedMixer
from hybridjax.sharding import context_axis, over_mesh, place
from pallas_kernels.linear_attention import linear_attention


class Mamba2(ConvolvedMixer):
    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        state_dim: int = 128,
        groups: int = 1,
        convolution: int = 4,
        eps: float = 1e-5,
    ):
        """Args:
        heads, head_dim: of x; their product is the papers' expanded width, twice `width`.
        state_dim: width of B and C, K; `groups` of them, each for heads / groups heads.
        convolution: tokens that the short convolutions see, the own included.
        """
        if heads % groups:
            raise UserError(f"groups is {groups}: it must divide heads ({heads})")
        self.heads, self.head_dim = heads, head_dim
        self.state_dim, self.groups = state_dim, groups
        self.state_shape = heads, state_dim, head_dim
        inner, shared = heads * head_dim, groups * state_dim
        keys = iter(jax.random.split(key, 11))
        project = lambda size: Linear((width, size), ("embed", "heads"), next(keys))
        convolve = lambda size: ShortConvolution(size, convolution, next(keys), bias=True)
        self.query, self.key, self.value = project(shared), project(shared), project(inner)
        self.query_convolution, self.key_convolution = convolve(shared), convolve(shared)
        self.value_convolution = convolve(inner)
        self.gate, self.step = project(inner), project(heads)
        rate = jax.random.uniform(next(keys), heads, minval=1.0, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rate), axes=("heads",))
        self.dt_bias = nnx.Param(time_step_bias(next(keys), heads), axes=("heads",))
        self.skip = nnx.Param(jnp.ones(heads), axes=("heads",))
        self.output_norm = RMSNorm(inner, eps=eps, axis="heads")
        self.output = Linear((inner, width), ("heads", "embed"), next(keys))

    def _read(self, x, q, k, v, recurrent, segments):
        group = self.heads // self.groups
        q, k = (repeat_heads(split_heads(y, self.state_dim), group) for y in (q, k))
        v = split_heads(v, self.head_dim).astype(jnp.float32)
        parameter = lambda p: place(p[...], "heads")
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + parameter(self.dt_bias))
        decay = -jnp.exp(parameter(self.A_log)) * step
        written = (step[..., None] * v).astype(x.dtype)
        o, recurrent = self._recur(q, k, written, decay, segments, recurrent)
        o = o.astype(jnp.float32) + parameter(self.skip)[:, None] * v
        o = o.reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        return self.output(self.output_norm(o).astype(x.dtype)), recurrent

    def _recur(self, q, k, v, decay, segments, recurrent):
        in_heads, in_state = ("batch", "length", "heads", None), ("batch", "heads", None, None)
        axis = context_axis(v.shape[1])
        state_shape = (v.shape[0], *self.state_shape)

        def kernel(q, k, v, decay, segments, recurrent):
            return linear_attention(
                q, k, v, decay, scale=1.0, segments=segments, initial_state=recurrent,
                output_final_state=True, context_axis=axis,
            )  # fmt: skip

        return over_mesh(
            kernel,
            in_axes=(in_heads,) * 3 + (in_heads[:3], ("batch", "length"), in_state),
            out_axes=((in_heads, v.shape), (in_state, state_shape)),
        )(q, k, v, decay, segments, recurrent)
