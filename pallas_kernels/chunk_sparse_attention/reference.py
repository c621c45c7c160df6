"""The definition, with every query's logits for all keys: the oracle. Follows v's dtype from f32.

The weight of a chunk is that of the slot which holds it, found by comparing all of them.
"""

import jax.numpy as jnp
import numpy as np


def chunk_sparse_attention(q, k, v, indices, weights, index, *, chunk_size, scale, off_by_one):
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    N, dtype = S // chunk_size, jnp.promote_types(v.dtype, jnp.float32)
    heads = lambda x, axis: jnp.repeat(x.astype(dtype), H // G, axis)
    q, k, v_wide = q.astype(dtype), heads(k, 2), heads(v, 2)

    holds = indices[..., None] == np.arange(N)  # [B, T, G, J, N]
    chosen = holds.any(3)
    chunk_weight = chosen if weights is None else (holds * weights[..., None]).sum(3)
    chosen, chunk_weight = heads(chosen, 2)[..., None] > 0, heads(chunk_weight, 2)[..., None]

    if index is not None:
        place = np.arange(S).reshape(N, chunk_size)
        chosen = chosen & (place <= index[:, :, None, None, None])
    logits = scale * jnp.einsum("bthk,bshk->bths", q, k).reshape(B, T, H, N, chunk_size)
    axes = (3, 4) if weights is None else 4
    largest = logits.max(axes, keepdims=True, where=chosen, initial=-1e30)
    largest = jnp.maximum(largest, 0) if off_by_one else largest
    p = jnp.exp(jnp.where(chosen, logits - largest, -jnp.inf))
    total = p.sum(axes, keepdims=True) + (jnp.exp(-largest) if off_by_one else 0)
    p = chunk_weight * p / jnp.where(total == 0, 1, total)
    return jnp.einsum("bths,bshv->bthv", p.reshape(B, T, H, S), v_wide).astype(v.dtype)
