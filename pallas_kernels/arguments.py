"""What every op checks of its arguments before an implementation sees them."""

from collections.abc import Container, Mapping

import jax.numpy as jnp
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
