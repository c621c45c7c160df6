"""Few queries, on every device, over keys that are split along a mesh axis in their order."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.xla import alike
from pallas_kernels.stick_breaking_attention import xla


def merged(q, k, v, q_segments, k_segments, q_index, k_index, scale, axis):
    """A device's part of the output counts for what later devices leave of the stick."""
    q, k, v, q_at, k_at = alike(
        (q, k, v, xla.Tokens(q_index, q_segments), xla.Tokens(k_index, k_segments)),
        jax.lax.axis_index(axis),
    )
    o, left = xla.forward(scale, q, k, v, q_at, k_at)
    lefts = jax.lax.all_gather(left, axis)
    later = jnp.arange(lefts.shape[0]) > jax.lax.axis_index(axis)
    taken = jnp.sum(jnp.where(later[:, None, None, None], lefts, 0), axis=0)
    return jax.lax.psum(jnp.exp(taken)[..., None] * o, axis).astype(v.dtype)
