"""Stick-breaking attention: each key takes its part of what the keys after it have left."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_attention
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.precision import exact_products
from pallas_kernels.stick_breaking_attention.context import merged

_dispatch = Dispatch("stick_breaking_attention", __name__, names=("reference", "xla"), best={})


@exact_products
def stick_breaking_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    q_index: Int[Array, "B T"] | None = None,
    k_index: Int[Array, "B S"] | None = None,
    context_axis: str | None = None,
    exchange: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T H V"]:
    """`o_t = sum_s b_ts prod_(s < r < t) (1 - b_tr) v_s`, with `b_ts = sigmoid(scale q_t k_s)`.

    Scaling Stick-Breaking Attention (https://arxiv.org/abs/2410.17980), section 2; in log space and
    f32. The weights sum to at most 1, and the order of the keys is all that says where they stand.

    Query t sees key s if `k_index[s] < q_index[t]` (not its own) and their segments are equal and
    not 0. A query that sees no key returns 0. Query head i reads key/value head `i // (H // G)`.

    Args:
      scale: default `K ** -0.5`.
      q_segments, k_segments: document ids; 0 = padding. Both or neither.
      q_index, k_index: places in the sequence; the keys lie in their order. Default: the order in
        the row (T == S only).
      context_axis: inside shard_map, the mesh axis along which rows are split: T and S are then the
        lengths of this device's parts, in the order of the devices.
      exchange: None: a device fetches all keys of the row. "merge" is for a split cache: every
        device has all queries and its own keys; all get the same outputs, which cannot be
        differentiated.
      implementation: None (best for the target platform), a name, or names to try in order.

    Returns:
      The outputs in v's dtype.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    check_attention(q, k, v, q_segments, k_segments, q_index, k_index)
    if 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"T ({q.shape[1]}) and S ({k.shape[1]}) must be at least 1")
    if exchange not in (None, "merge") or (exchange and not context_axis):
        raise ValueError(f"exchange is {exchange!r}: use None, or with a context_axis 'merge'")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (B, T), S = q.shape[:2], k.shape[1]
    q_segments = jnp.ones((B, T), jnp.int32) if q_segments is None else q_segments
    k_segments = jnp.ones((B, S), jnp.int32) if k_segments is None else k_segments
    order = lambda index, n: jnp.broadcast_to(jnp.arange(n) if index is None else index, (B, n))
    q_index, k_index = order(q_index, T), order(k_index, S)
    if exchange == "merge":
        return merged(q, k, v, q_segments, k_segments, q_index, k_index, scale, context_axis)
    if context_axis is not None:
        q_index = q_index + T * jax.lax.axis_index(context_axis)
        gather = lambda x: jax.lax.all_gather(x, context_axis, axis=1, tiled=True)
        k, v, k_segments = gather(k), gather(v), gather(k_segments)
        k_index = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    return _dispatch(
        implementation, q, k, v, scale=scale, q_segments=q_segments, k_segments=k_segments,
        q_index=q_index, k_index=k_index)
