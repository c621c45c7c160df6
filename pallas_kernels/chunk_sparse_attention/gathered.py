"""Attention of each query over chunks that were already fetched for it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def attend_chunks(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G J C K"],
    v: Float[Array, "B T G J C V"],
    indices: Int[Array, "B T G J"],
    weights: Float[Array, "B T G J"] | None = None,
    index: Int[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    off_by_one: bool = False,
) -> Float[Array, "B T H V"]:
    """`chunk_sparse_attention` where `k[b, t, g, j]` is the chunk in a slot.

    Of `indices` only counts which are -1, unless an index is given; what was fetched for these may
    be any finite numbers.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = grouped(q, k.shape[2])
    logits = logits_of(q, k, indices, index, scale)
    p, _ = softmax(logits, off_by_one, axes=(-2, -1) if weights is None else -1)
    if weights is not None:
        p = p * jnp.where(indices < 0, 0, weights)[:, :, :, None, :, None]
    o = dot("btgrjc,btgjcv->btgrv", p.astype(v.dtype), v)
    return o.reshape(*q.shape[:2], -1, v.shape[-1]).astype(v.dtype)


def grouped(q: Float[Array, "B T H K"], G: int) -> Float[Array, "B T G R K"]:
    """R query heads for each of G key/value heads."""
    return q.reshape(*q.shape[:2], G, -1, q.shape[-1])


def logits_of(
    q: Float[Array, "B T G R K"], k: Float[Array, "B T G J C K"], indices: Int[Array, "B T G J"],
    index: Int[Array, "B T"] | None, scale: float,
) -> Float[Array, "B T G R J C"]:
    """-inf in empty slots, and of keys after the query's index."""
    logits = scale * dot("btgrk,btgjck->btgrjc", q, k)
    seen = (indices >= 0)[..., None]
    if index is not None:
        C = k.shape[-2]
        place = indices[..., None] * C + np.arange(C)
        seen = seen & (place <= index[..., None, None, None])
    return jnp.where(seen[:, :, :, None], logits, -jnp.inf)


def softmax(
    logits: Float[Array, "... J C"], off_by_one: bool, axes: int | tuple[int, int]
) -> tuple[Float[Array, "... J C"], Float[Array, "... J 1"]]:
    """Over `axes`: a chunk's keys, or those of all chunks too. 0 where there is no chunk.

    Also the logarithms of the denominators, inf where there is no chunk.
    """
    largest = jax.lax.stop_gradient(logits.max(axes, keepdims=True))
    base = jnp.maximum(largest, 0) if off_by_one else jnp.where(largest == -jnp.inf, 0, largest)
    p = jnp.exp(logits - base)
    total = p.sum(axes, keepdims=True)
    total += jnp.exp(-base) if off_by_one else 0
    none = total == 0
    total = jnp.where(none, 1, total)
    return p * (1 / total), jnp.where(none, jnp.inf, base + jnp.log(total))


def dot(subscripts, x, y):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)
