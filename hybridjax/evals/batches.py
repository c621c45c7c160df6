"""Rows through a jitted function, in batches of one shape, so that it compiles once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hybridjax.sharding import ways

TOKENS = 16384  # in one batch
NO_SCALING = 1e30  # as a base `a`: ln(t + a) / ln(a) is exactly 1 in f32


def in_batches(f: Callable[[np.ndarray], jax.Array], rows: np.ndarray) -> np.ndarray:
    """`f(rows)` for rows `[n, T, ...]`; the last batch is padded, and devices share each batch.

    Every process gives the same rows and gets all results.
    """
    size = max(1, min(len(rows), TOKENS // rows.shape[1]))
    size = -(-size // ways("batch")) * ways("batch")
    results = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        padded = np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (rows.ndim - 1)])
        results.append(multihost_utils.process_allgather(f(padded), tiled=True)[: len(batch)])
    return np.concatenate(results)


def traced(logit_base: float | None) -> jax.Array:
    """A base of the log scaling as data, so that one program serves every base and none."""
    return jnp.float32(NO_SCALING if logit_base is None else logit_base)
