"""Linear attention with a decaying state (Lightning Attention, simple GLA, RetNet).

Lightning Attention-2 (Qin et al., 2024, https://arxiv.org/abs/2401.04658), eq. 2-4; with a decay
per token, Gated Linear Attention (Yang et al., 2023, https://arxiv.org/abs/2312.06635), eq. 3,
with one gate per head.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays, check_range
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.linear_attention.context import split_linear_attention
from pallas_kernels.precision import exact_products

_dispatch = Dispatch(
    "linear_attention", __name__, names=("reference", "xla", "tpu", "gpu", "triton"),
    best={"tpu": ("tpu", "xla"), "gpu": ("gpu", "triton", "xla")})


@exact_products
def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay: Float[Array, "H"] | Float[Array, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    context_axis: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """`S_t = exp(decay_t) S_{t-1} + k_t v_t^T`, `o_t = scale * q_t S_t`, in f32.

    Args:
      decay: log decay, finite and <= 0: one per head, or one per token and head. A concrete
        positive value is refused; a traced one is not seen and lets the state grow.
      scale: default `K ** -0.5`.
      initial_state: the state before the row's first document; default zero.
      segments: document ids, each one contiguous run; 0 = padding. The state is cleared where a
        new document begins. Padding leaves the state as it is, and its outputs are 0.
      output_final_state: also return the state after the row's last real token.
      chunk_size: tokens per chunk of the chunked implementations; default: their choice.
      context_axis: inside shard_map, the mesh axis along which rows are split: q, k, v, segments
        and a decay per token are this device's contiguous part of T; the states are those of the
        whole row, the same on every device.
      implementation: None (best for the target platform), a name, or names to try in order.

    Returns:
      The outputs in v's dtype, and the final state in f32 (None unless asked for).
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    decay = decay if isinstance(decay, (np.ndarray, jax.Array)) else np.asarray(decay)
    _check_shapes(q, k, v, decay, initial_state, segments)
    _check_values(decay, chunk_size)
    op = functools.partial(
        _dispatch, implementation, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )
    if context_axis is not None:
        op = functools.partial(split_linear_attention, op, context_axis)
    o, state = op(q, k, v, decay, initial_state=initial_state, segments=segments,
                  output_final_state=output_final_state)
    return o, state if output_final_state else None


def _check_shapes(q, k, v, decay, initial_state, segments):
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k [B, T, H, K] and v [B, T, H, V] must have rank 4, "
                         f"got {q.shape}, {k.shape}, {v.shape}")
    B, T, H, K = q.shape
    expected = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, H, v.shape[-1])),
        "decay": (decay, (H,) if decay.ndim == 1 else (B, T, H)),
        "initial_state": (initial_state, (B, H, K, v.shape[-1])),
        "segments": (segments, (B, T)),
    }
    check_arrays(expected, of=f"q {list(q.shape)}")
    if T == 0:
        raise ValueError("T must be at least 1, got 0")


def _check_values(decay, chunk_size):
    check_range("decay is a log decay and must be <= 0", decay, -np.inf, 0)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
