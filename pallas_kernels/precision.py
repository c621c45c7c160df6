"""How many digits products have on accelerators."""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def exact_products(f: Callable) -> Callable:
    """`f`, with products of f32 in f32 where its first array is f32.

    By default a TPU multiplies f32 in one pass of bf16 and a GPU in tf32: 3 digits, which is what
    bf16 arrays ask for and f32 ones do not. For ops, and for backward rules, which are traced when
    their op has returned: residuals begin with the op's first array.
    """

    @functools.wraps(f)
    def run(*args, **kwargs):
        dtypes = (x.dtype for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "dtype"))
        wide = next(dtypes, None) in (jnp.float32, jnp.float64)
        with full_precision() if wide else contextlib.nullcontext():
            return f(*args, **kwargs)

    return run


def full_precision() -> contextlib.AbstractContextManager:
    return jax.default_matmul_precision("highest")
