"""Attention by cuDNN through jax.nn.dot_product_attention (GPU). Not yet run on hardware."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_platform


def attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index, window):
    if target_platform() != "gpu":
        raise NotImplementedError(f"serves GPU only, the target is {target_platform()}")
    if q_segments is not None:
        raise NotImplementedError("takes no segments: they would need a T x S mask in memory")
    if q_index is not None or k_index is not None or q.shape[1] != k.shape[1]:
        raise NotImplementedError("takes no q_index, k_index: queries and keys in row order only")
    if window is not None and not isinstance(window, int):
        raise NotImplementedError("needs a window known at compile time")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}")
    K, V = q.shape[-1], v.shape[-1]
    if K != V or K % 8 or K > 128:
        raise NotImplementedError(f"needs K = V, a multiple of 8 up to 128, got {K} and {V}")
    try:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation="cudnn",
            # The largest index distance to the left, and none to the right.
            local_window_size=None if window is None else (window - 1, 0))
    except RuntimeError as error:  # cuDNN is missing or too old
        raise NotImplementedError(str(error)) from error
