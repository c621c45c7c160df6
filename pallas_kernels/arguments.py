"""What every op checks of its arguments before an implementation sees them."""

from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def check_arrays(
    expected: Mapping[str, tuple[Array | None, tuple[int, ...]]],
    of: str,
    integers: Container[str] = ("segments",),
) -> None:
    """Compares shapes and kinds of dtype.

    Args:
      expected: by name each array, None where it is not given, and the shape that it must have.
      of: the arguments from which the shapes follow, as a person should read them.
      integers: names of the arrays of integers; the others are floating point.

    Raises:
      ValueError: the first array that is not as it must be.
    """
    for name, (array, shape) in expected.items():
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for {of}, got {list(array.shape)}")
        if not jnp.issubdtype(array.dtype, jnp.integer if name in integers else jnp.floating):
            kind = "integers" if name in integers else "floating point"
            raise ValueError(f"{name} must be {kind}, got {array.dtype}")


def check_attention(q, k, v, q_segments, k_segments, q_index, k_index) -> None:
    """The arrays of an op in which queries [B, T, H, K] see keys of a row [B, S, G, K].

    Raises:
      ValueError: a shape or dtype that does not fit; what must be given together and is not.
    """
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] must have rank 4, "
                         f"got {q.shape}, {k.shape}, {v.shape}")
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    expected = {
        "k": (k, (B, S, G, K)), "v": (v, (B, S, G, v.shape[-1])),
        "q_segments": (q_segments, (B, T)), "k_segments": (k_segments, (B, S)),
        "q_index": (q_index, (B, T)), "k_index": (k_index, (B, S)),
    }
    check_arrays(
        expected, of=f"q {list(q.shape)}",
        integers=("q_segments", "k_segments", "q_index", "k_index"),
    )
    if H % G:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {H} and {G}")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments and k_segments must be given together")
    if T != S and (q_index is None or k_index is None):
        raise ValueError(f"q_index and k_index must be given where T ({T}) differs from S ({S})")


def check_range(rule: str, x: Array, low: float, high: float) -> None:
    """Of concrete arrays: values of a traced one are not known yet.

    Raises:
      ValueError: `rule`, and the least and the greatest value.
    """
    if isinstance(x, jax.core.Tracer):
        return
    x = np.asarray(x)  # jax.numpy would trace a constant that a compiled function closes over
    if x.size and not (x.min() >= low and x.max() <= high):
        raise ValueError(f"{rule}, got values from {x.min()} to {x.max()}")


def check_exchange(exchange: str | None, context_axis: str | None) -> None:
    """Of the ops on chunks. Raises ValueError."""
    if exchange not in (None, "merge") or (exchange and not context_axis):
        raise ValueError(f"exchange is {exchange!r}: use None, or with a context_axis 'merge'")


def refuse_traced(scale: float | Array) -> None:
    """Raises NotImplementedError for a scale that a kernel cannot be built with."""
    if isinstance(scale, jax.core.Tracer):
        raise NotImplementedError("needs a scale known at compile time")
