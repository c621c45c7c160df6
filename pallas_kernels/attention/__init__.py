"""Causal softmax attention, full or windowed, over packed documents and grouped heads."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_attention
from pallas_kernels.attention import context
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.precision import exact_products

_dispatch = Dispatch(
    "attention", __name__, names=("reference", "xla", "splash", "cudnn"),
    best={"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla")},
)


@exact_products
def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    q_index: Int[Array, "B T"] | None = None,
    k_index: Int[Array, "B S"] | None = None,
    window: int | Int[Array, ""] | None = None,
    context_axis: str | None = None,
    exchange: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T H V"]:
    """`softmax(scale q k^T) v` over the keys a query sees.

    Attention Is All You Need (https://arxiv.org/abs/1706.03762), eq. 1.

    Query t sees key s if `k_index[s] <= q_index[t]`, their segments are equal and not 0, and
    `q_index[t] - k_index[s] < window`. A query that sees no key returns 0 and has no gradient.
    Query head i reads key/value head `i // (H // G)`. The softmax is computed in f32.

    Args:
      scale: default `K ** -0.5`.
      q_segments, k_segments: document ids; 0 = padding. Both or neither.
      q_index, k_index: places in the sequence, >= 0; default: the order in the row (T == S only).
      window: number of keys a query sees, its own included; may be traced; None = all.
      context_axis: the mesh axis along which the row is split, inside a shard_map: T and S are
        then the lengths of this device's parts, in the order of the devices.
      exchange: how the parts meet: "ring", "gather", or "border" for a static window; None: the
        border where the window spans at most half of the row, else the ring. "merge" is for a
        split cache: every device has all queries and its own keys, at `k_index`, in any order;
        all get the same outputs, which cannot be differentiated.
      implementation: None (best for the target platform), a name, or names to try in order.
        Split rows are served by "xla".

    Returns:
      The outputs in v's dtype.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    check_attention(q, k, v, q_segments, k_segments, q_index, k_index)
    how = dict(
        scale=q.shape[-1] ** -0.5 if scale is None else scale, q_segments=q_segments,
        k_segments=k_segments, q_index=q_index, k_index=k_index, window=_checked_window(window),
    )
    if context_axis is None:
        if exchange is not None:
            raise ValueError(f"exchange={exchange!r} needs a context_axis")
        return _dispatch(implementation, q, k, v, **how)
    _check_exchange(exchange, q_index, k_index, implementation)
    return context.attention(q, k, v, **how, axis=context_axis, exchange=exchange)


def _check_exchange(exchange, q_index, k_index, implementation):
    if exchange not in (None, *context.EXCHANGES):
        raise ValueError(f"exchange {exchange!r} is unknown; known are {context.EXCHANGES}")
    if exchange == "merge" and (q_index is None or k_index is None):
        raise ValueError("exchange='merge' needs q_index and k_index: the keys may lie anywhere")
    named = (implementation,) if isinstance(implementation, str) else implementation
    if named is not None and "xla" not in named:
        raise NotImplementedError(f"attention: only xla serves a context_axis, not {named}")


def _checked_window(window):
    """The window, as an int unless it is data."""
    if window is None:
        return None
    if jnp.ndim(window) or not jnp.issubdtype(jnp.result_type(window), jnp.integer):
        raise ValueError(f"window must be None or one integer, got {window!r}")
    if isinstance(window, jax.Array):
        return window
    if window < 1:
        raise ValueError(f"window counts the query's own key and must be >= 1, got {window}")
    return int(window)
