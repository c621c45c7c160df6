"""The definition, with the whole T x S matrix: the oracle. Follows v's dtype from f32 up."""

import jax.numpy as jnp


def attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index, window):
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v_wide = q.astype(dtype), jnp.repeat(k, H // G, 2), jnp.repeat(v, H // G, 2)
    q_index = jnp.arange(T)[None] if q_index is None else q_index
    k_index = jnp.arange(S)[None] if k_index is None else k_index

    distance = q_index[:, :, None] - k_index[:, None, :]
    visible = jnp.broadcast_to(distance >= 0, (B, T, S))
    if window is not None:
        visible &= distance < window
    if q_segments is not None:
        visible &= q_segments[:, :, None] == k_segments[:, None, :]
        visible &= (q_segments != 0)[:, :, None]
    visible = visible[:, None]

    logits = scale * jnp.einsum("bthk,bshk->bhts", q, k.astype(dtype))
    largest = jnp.max(logits, axis=-1, keepdims=True, where=visible, initial=-1e30)
    weights = jnp.exp(jnp.where(visible, logits - largest, -jnp.inf))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("bhts,bshv->bthv", weights, v_wide.astype(dtype)).astype(v.dtype)
