"""The gated delta rule: a decaying state from which a key's old value is erased as it is written.

Gated Delta Networks (Yang, Kautz & Hatamizadeh, 2024, https://arxiv.org/abs/2412.06464), eq. 10;
without a decay, DeltaNet (Yang et al., 2024, https://arxiv.org/abs/2406.06484), eq. 1.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays, check_range
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.gated_delta_rule.context import split_gated_delta_rule
from pallas_kernels.precision import exact_products

_dispatch = Dispatch("gated_delta_rule", __name__, names=("reference", "xla", "tpu", "gpu"),
                     best={"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")})
_L2_EPS = 1e-6  # inside the square root of a sum, not of a mean


@exact_products
def gated_delta_rule(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    decay: Float[Array, "B T H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    output_final_state: bool = False,
    l2_norm: bool = False,
    chunk_size: int | None = None,
    context_axis: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T Ho V"], Float[Array, "B H K V"] | None]:
    """`S_t = R_t + k_t (beta_t (v_t - k_t R_t))^T`, `o_t = scale * q_t S_t`, in f32, where
    `R_t = exp(decay_t) S_{t-1}`.

    There is one state per value head. Fewer key heads are shared among them, Hk dividing H, and
    so are fewer query heads; with more query heads than states, Hq / H of them read each state.
    In both cases neighbours share: value head h reads key head `h // (H / Hk)`. Outputs have
    `max(Hq, H)` heads.

    Args:
      beta: how much of the old value is replaced, in [0, 2]; above 1 it is overshot, and the
        transition has a negative eigenvalue. A concrete value outside is refused; a traced one is
        not seen.
      decay: log decay, finite and <= 0; None does not decay. A concrete positive value is
        refused; a traced one is not seen and lets the state grow.
      scale: default `K ** -0.5`.
      initial_state: the state before the row's first document; default zero.
      segments: document ids, each one contiguous run; 0 = padding. The state is cleared where a
        new document begins. Padding leaves the state as it is, and its outputs are 0.
      output_final_state: also return the state after the row's last real token.
      l2_norm: divide each query and key by `sqrt(|x|^2 + 1e-6)` first. Without it keys should be
        of length <= 1, or the state may grow without bound.
      chunk_size: tokens per chunk of the chunked implementations; default: their choice.
      context_axis: inside shard_map, the mesh axis along which rows are split: arrays and segments
        are this device's contiguous part of T; the states are those of the whole row, the same on
        every device.
      implementation: None (best for the target platform), a name, or names to try in order.

    Returns:
      The outputs in v's dtype, and the final state in f32 (None unless asked for).
    """
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    _check_shapes(q, k, v, beta, decay, initial_state, segments)
    _check_values(beta, decay, chunk_size)
    if l2_norm:
        q, k = _l2_normalised(q), _l2_normalised(k)
    op = functools.partial(
        _dispatch, implementation, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )
    if context_axis is not None:
        op = functools.partial(split_gated_delta_rule, op, context_axis)
    o, state = op(q, k, v, beta, decay, initial_state=initial_state, segments=segments,
                  output_final_state=output_final_state)
    return o, state if output_final_state else None


def _l2_normalised(x):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _L2_EPS)


def _check_shapes(q, k, v, beta, decay, initial_state, segments):
    for name, x in dict(q=q, k=k, v=v).items():
        if x.ndim != 4:
            raise ValueError(f"{name} must have rank 4, [B, T, heads, width], got {list(x.shape)}")
    (B, T, Hq, K), Hk, (H, V) = q.shape, k.shape[2], v.shape[2:]
    if Hk == 0 or H % Hk:
        raise ValueError(f"k's heads must divide v's, got {Hk} and {H}")
    if Hq == 0 or (H % Hq and Hq % H):
        raise ValueError(f"q's heads must divide v's or be a multiple of them, got {Hq} and {H}")
    expected = {
        "q": (q, (B, T, Hq, K)),
        "k": (k, (B, T, Hk, K)),
        "v": (v, (B, T, H, V)),
        "beta": (beta, (B, T, H)),
        "decay": (decay, (B, T, H)),
        "initial_state": (initial_state, (B, H, K, V)),
        "segments": (segments, (B, T)),
    }
    check_arrays(expected, of=f"q {list(q.shape)} and v {list(v.shape)}")
    if 0 in (T, K, V):
        raise ValueError(f"T, K and V must be at least 1, got {T}, {K} and {V}")


def _check_values(beta, decay, chunk_size):
    check_range("beta must be in [0, 2]", beta, 0, 2)
    if decay is not None:
        check_range("decay is a log decay and must be <= 0", decay, -np.inf, 0)
        check_range("decay must be finite", decay, np.finfo(np.float32).min, 0)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
