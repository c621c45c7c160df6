"""Attention over every chunk of a short memory, those not chosen with weight 0.

Where chunks are few, products with all keys beat gathering the chosen ones for each query. Logits
lie as [keys, queries], so that a softmax over a chunk's keys adds up whole vectors of queries. The
gradients are those of `xla.py`; of a tile of queries nothing is kept for them: exponents against a
kept logsumexp are taken again in each of their uses, and cost more than another softmax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.chunk_sparse_attention.gathered import dot, grouped, softmax
from pallas_kernels.precision import exact_products
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
    """`chunk_sparse_attention`."""
    (B, _, H, _), (S, G) = q.shape, k.shape[1:3]
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))

    def tile(q, indices, weights, index):
        t = q.shape[1]
        of_chunks = _of_chunks(indices, weights, S // chunk_size)
        q = jnp.moveaxis(grouped(q, G), 1, 3)
        o = _attend(scale, off_by_one, weights is None, q, k, v, of_chunks, index)
        return jnp.moveaxis(o, 3, 1).reshape(B, t, H, -1).astype(v.dtype)

    return in_tiles(tile, tile_size() // (B * S * H), q, indices, weights, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    scale: float,
    off_by_one: bool,
    joint: bool,
    q: Float[Array, "B G R T K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S V"],
    weights: Float[Array, "B G N 1 1 T"],
    index: Int[Array, "B T"] | None,
) -> Float[Array, "B G R T V"]:
    p, _ = softmax(_logits(q, k, weights, index, scale, joint), off_by_one, _axes(joint))
    p = p if joint else p * weights
    return dot("bgsrt,bgsv->bgrtv", _of_keys(p).astype(v.dtype), v)


def _attend_forward(scale, off_by_one, joint, *arrays):
    return _attend(scale, off_by_one, joint, *arrays), arrays


def _attend_backward(scale, off_by_one, joint, arrays, do):
    q, k, v, weights, index = arrays
    p, _ = softmax(_logits(q, k, weights, index, scale, joint), off_by_one, _axes(joint))
    dp = dot("bgsv,bgrtv->bgsrt", v, do.astype(v.dtype)).reshape(p.shape)
    d = (p * dp).sum(_axes(joint), keepdims=True)
    p = p if joint else p * weights
    ds = _of_keys(scale * p * (dp - d)).astype(q.dtype)
    dq = dot("bgsrt,bgsk->bgrtk", ds, k)
    dk = dot("bgsrt,bgrtk->bgsk", ds, q)
    dv = dot("bgsrt,bgrtv->bgsv", _of_keys(p).astype(v.dtype), do.astype(v.dtype))
    dweights = None if joint else d.sum(4, keepdims=True)
    gradients = (dx.astype(x.dtype) for dx, x in zip((dq, dk, dv), (q, k, v), strict=True))
    return *gradients, dweights, None


_attend.defvjp(_attend_forward, exact_products(_attend_backward))


def _of_chunks(indices, weights, N) -> Float[Array, "B G N 1 1 T"]:
    """The weight of every chunk for every query, 0 of those not chosen; 1 where there are none."""
    chosen = indices[..., None] == np.arange(N)
    of_chunks = jnp.where(chosen, 1.0 if weights is None else weights[..., None], 0.0).sum(3)
    return jnp.moveaxis(of_chunks, 1, 3)[:, :, :, None, None]


def _logits(q, k, weights, index, scale, joint) -> Float[Array, "B G N C R T"]:
    """-inf of keys after the query's index and, if joint, of chunks that were not chosen."""
    (B, G, S, _), N = k.shape, weights.shape[2]
    logits = scale * dot("bgsk,bgrtk->bgsrt", k, q)
    if index is not None:
        seen = np.arange(S)[:, None] <= index[:, None]  # [B, S, T]
        logits = jnp.where(seen[:, None, :, None], logits, -jnp.inf)
    logits = logits.reshape(B, G, N, S // N, *logits.shape[3:])
    return jnp.where(weights > 0, logits, -jnp.inf) if joint else logits


def _axes(joint: bool):
    """Those of the logits that a softmax runs over."""
    return (2, 3) if joint else 3


def _of_keys(x: Float[Array, "B G N C R T"]) -> Float[Array, "B G S R T"]:
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
