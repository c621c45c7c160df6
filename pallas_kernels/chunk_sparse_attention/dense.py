"""Attention over every chunk of a short memory, those not chosen with weight 0.

Where chunks are few, products with all keys beat gathering the chosen ones for each query. Logits
lie as [keys, queries], so that a softmax over a chunk's keys adds up whole vectors of queries.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.chunk_sparse_attention.gathered import dot, grouped
from pallas_kernels.selection import in_tiles, tile_size


def attend_all(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Int[Array, "B T G J"],
    weights: Float[Array, "B T G J"] | None,
    index: Int[Array, "B T"] | None,
    *,
    chunk_size: int,
    scale: float,
    off_by_one: bool,
) -> Float[Array, "B T H V"]:
    """`chunk_sparse_attention`, differentiated by JAX; a tile's logits are made again."""
    (B, _, H, _), (S, G) = q.shape, k.shape[1:3]
    N = S // chunk_size
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))

    @jax.checkpoint
    def tile(q, indices, weights, index):
        t = q.shape[1]
        q = jnp.moveaxis(grouped(q, G), 1, 3)  # [B, G, R, t, K]
        logits = scale * dot("bgsk,bgrtk->bgsrt", k, q)
        if index is not None:
            seen = np.arange(S)[:, None] <= index[:, None]  # [B, S, t]
            logits = jnp.where(seen[:, None, :, None], logits, -jnp.inf)
        logits = logits.reshape(B, G, N, chunk_size, H // G, t)
        p = _softmax(logits, _of_chunks(indices, weights, N), off_by_one, joint=weights is None)
        p = p.reshape(B, G, S, H // G, t).astype(v.dtype)
        o = dot("bgsrt,bgsv->bgrtv", p, v)
        return jnp.moveaxis(o, 3, 1).reshape(B, t, H, -1).astype(v.dtype)

    return in_tiles(tile, tile_size() // (B * S * H), q, indices, weights, index)


def _of_chunks(indices, weights, N) -> Float[Array, "B G N 1 1 T"]:
    """The weight of every chunk for every query, 0 of those not chosen; 1 where there are none."""
    chosen = indices[..., None] == np.arange(N)
    of_chunks = jnp.where(chosen, 1.0 if weights is None else weights[..., None], 0.0).sum(3)
    return jnp.moveaxis(of_chunks, 1, 3)[:, :, :, None, None]


def _softmax(logits: Float[Array, "B G N C R T"], weights, off_by_one: bool, joint: bool):
    """Within each chunk, times its weight; if joint, over the keys of all chunks of weight 1."""
    axes = (2, 3) if joint else 3
    logits = jnp.where(weights > 0, logits, -jnp.inf) if joint else logits
    largest = jax.lax.stop_gradient(logits.max(axes, keepdims=True))
    base = jnp.maximum(largest, 0) if off_by_one else jnp.maximum(largest, -1e30)
    p = jnp.exp(logits - base)
    total = p.sum(axes, keepdims=True)
    total += jnp.exp(-base) if off_by_one else 0
    return p * ((1.0 if joint else weights) / jnp.where(total == 0, 1, total))
