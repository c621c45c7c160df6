"""Attention by the splash kernels that come with JAX (TPU). Not yet run on hardware."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_platform

_LANES = 128


def attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index, window):
    T, S = q.shape[1], k.shape[1]
    if target_platform() != "tpu":
        raise NotImplementedError(f"serves TPU only, the target is {target_platform()}")
    if q_index is not None or k_index is not None:
        raise NotImplementedError("takes no q_index, k_index: queries and keys in row order only")
    if T != S or T % _LANES:
        raise NotImplementedError(f"needs T = S, a multiple of {_LANES}, got T {T} and S {S}")
    if window is not None and not isinstance(window, int):
        raise NotImplementedError("needs a window known at compile time")

    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _kernel(q.shape[2], T, window)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not scale
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    if q_segments is None:
        return jnp.moveaxis(jax.vmap(kernel)(q, k, v), 1, 2).astype(v.dtype)
    o = jax.vmap(kernel)(q, k, v, SegmentIds(q_segments, k_segments))
    # To the kernel padding is one more document; its rows end here, forward and backward.
    o = jnp.where((q_segments != 0)[:, None, :, None], o, 0)
    return jnp.moveaxis(o, 1, 2).astype(v.dtype)


def _kernel(heads, T, window):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (512, 256, _LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        **{name: block for name in ("block_q", "block_kv", "block_kv_compute", "block_q_dkv",
                                    "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
                                    "block_kv_dq")})
    if window is None:
        mask = splash.CausalMask((T, T))
    else:
        mask = splash.LocalMask((T, T), window_size=(window - 1, 0), offset=0)
    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1)
    return make(mask=splash.MultiHeadMask([mask] * heads), block_sizes=sizes)
