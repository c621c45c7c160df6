"""Attention over chosen chunks of a memory, for each query and group of heads its own.

Hierarchical sparse attention (Hu et al., 2025, https://arxiv.org/abs/2510.17196, eq. 2; Random
Long-Context Access, https://arxiv.org/abs/2504.16795): a softmax within each chunk, and the chunks'
outputs summed with weights. Without weights, the selected branch of NSA (Yuan et al., 2025,
https://arxiv.org/abs/2502.11089): one softmax over the tokens of all chosen chunks.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays, check_exchange, check_range
from pallas_kernels.chunk_sparse_attention import context
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.precision import exact_products

_dispatch = Dispatch("chunk_sparse_attention", __name__, names=("reference", "xla", "tpu", "gpu"),
                     best={"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")})


@exact_products
def chunk_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Int[Array, "B T G J"],
    weights: Float[Array, "B T G J"] | None = None,
    *,
    chunk_size: int,
    index: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    off_by_one: bool = False,
    context_axis: str | None = None,
    exchange: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T H V"]:
    """`o_t = sum_j w_tj softmax(scale q_t K_j^T) V_j`, of the chunks j in the query's J slots.

    Chunk i holds the keys from `i * chunk_size` on. A query sees all of them or, given its index,
    those up to it, so that it can choose the chunk in which it stands. Query head h reads key/value
    head `h // (H // G)` and the slots of that group. A query that sees nothing returns 0 and has no
    gradient. Softmaxes are computed in f32.

    Args:
      indices: chosen chunks, distinct; -1 = an empty slot, which contributes nothing.
      weights: of the slots, of empty ones anything; None: one softmax over the keys of all chosen
        chunks together.
      index: the queries' places in the row of keys; None: every key of a chosen chunk is seen.
      scale: default `K ** -0.5`.
      off_by_one: add 1 to the denominator of each softmax, so that a query may take nothing.
      context_axis: inside shard_map, the mesh axis along which rows are split: queries, keys and
        values are those of this device's contiguous part; indices count chunks from the row's
        start.
      exchange: None gathers all keys and values. "merge" is for few queries, whole on every device,
        as indices and weights are: each reads what it holds of the chosen chunks, and the outputs
        are summed. Bytes and reasons are in context.py.
      implementation: None (best for the target platform), a name, or names to try in order.

    Returns:
      The outputs in v's dtype.
    """
    q, k, v, indices = (jnp.asarray(x) for x in (q, k, v, indices))
    _check_shapes(q, k, v, indices, weights, index, chunk_size)
    check_exchange(exchange, context_axis)
    if context_axis is not None and exchange is None:
        k, v = (jax.lax.all_gather(x, context_axis, axis=1, tiled=True) for x in (k, v))
    N = k.shape[1] // chunk_size
    check_range(f"indices must be chunks from 0 to {N - 1}, or -1 for an empty slot", indices,
                -1, N - 1)
    attend = functools.partial(_dispatch, implementation)
    if exchange is not None:
        attend = functools.partial(context.merged, attend, axis=context_axis)
    if weights is not None:
        weights = jnp.where(indices < 0, 0, weights)
    return attend(
        q, k, v, indices, weights, index, chunk_size=chunk_size, off_by_one=off_by_one,
        scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _check_shapes(q, k, v, indices, weights, index, chunk_size):
    for name, x in dict(q=q, k=k, v=v, indices=indices).items():
        if x.ndim != 4:
            raise ValueError(f"{name} must have rank 4, got {list(x.shape)}")
    (B, T, H, K), (S, G), V, J = q.shape, k.shape[1:3], v.shape[-1], indices.shape[-1]
    expected = {
        "k": (k, (B, S, G, K)), "v": (v, (B, S, G, V)), "q": (q, (B, T, H, K)),
        "indices": (indices, (B, T, G, J)), "weights": (weights, (B, T, G, J)),
        "index": (index, (B, T)),
    }
    check_arrays(expected, of=f"q {list(q.shape)} and k {list(k.shape)}",
                 integers=("indices", "index"))
    if 0 in (T, G, K, V, J):
        raise ValueError(f"T, G, K, V and J must be at least 1, got {T}, {G}, {K}, {V} and {J}")
    if H % G:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {H} and {G}")
    if chunk_size < 1 or S % chunk_size:
        raise ValueError(f"keys must be whole chunks, got {S} keys and chunk_size {chunk_size}")
