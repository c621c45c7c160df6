"""The definition, with the whole T x S matrix: the oracle. Follows v's dtype from f32 up."""

import jax
import jax.numpy as jnp


def stick_breaking_attention(q, k, v, *, scale, q_segments, k_segments, q_index, k_index):
    group = q.shape[2] // k.shape[2]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, wide = (x.astype(dtype) for x in (q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)))
    visible = k_index[:, None] < q_index[..., None]
    visible &= (q_segments[..., None] == k_segments[:, None]) & (q_segments != 0)[..., None]
    visible = visible[:, None]

    logits = scale * jnp.einsum("bthk,bshk->bhts", q, k)
    taken = jnp.where(visible, jax.nn.sigmoid(logits), 0)
    left = jnp.cumprod(1 - taken[..., ::-1], axis=-1)[..., ::-1]  # by a key and those after it
    left = jnp.pad(left[..., 1:], [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    return jnp.einsum("bhts,bshv->bthv", taken * left, wide).astype(v.dtype)
