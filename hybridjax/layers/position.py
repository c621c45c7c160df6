"""Rotary position embedding, exact to position 2**25.

At position 16 million, f32 `position * frequency` is noise. So positions stay integers, split as
`4096 hi + lo`; the angles of both parts are tabulated on the host in f64, and the two rotations
are composed: cos(a + b) = cos a cos b - sin a sin b.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.sharding import current_spec

MAX_POSITION = 2**25
_LOW = 4096


@functools.cache
def _table(count: int, stride: int, width: int, theta: float) -> np.ndarray:
    """cos and sin of `stride * n * frequency`, n < count: `[count, 2, width / 2]` in f32."""
    frequency = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angle = stride * np.arange(count, dtype=np.float64)[:, None] * frequency
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def rotary_angles(
    positions: Int[Array, "B T"], width: int, theta: float
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of each position's angles, in f32, with an axis for the heads."""
    if width % 2:
        raise UserError(f"rotary positions need an even head_dim, not {width}")
    low = _lookup(_table(_LOW, 1, width, theta), positions % _LOW)
    high = _lookup(_table(MAX_POSITION // _LOW + 1, _LOW, width, theta), positions // _LOW)
    (c0, s0), (c1, s1) = jnp.moveaxis(low, 2, 0), jnp.moveaxis(high, 2, 0)
    cos, sin = c0 * c1 - s0 * s1, s0 * c1 + c0 * s1
    return cos[:, :, None], sin[:, :, None]


def _lookup(table: np.ndarray, index: Int[Array, "B T"]) -> Float[Array, "B T 2 half"]:
    out = current_spec(("batch", "length", None, None), (*index.shape, *table.shape[1:]))
    return jnp.asarray(table).at[index].get(out_sharding=out)


def rotate(
    x: Float[Array, "B T H K"], angles: tuple[Float[Array, "B T 1 half"], ...]
) -> Float[Array, "B T H K"]:
    """Rotates the pairs (x_i, x_{i + K/2}) (arXiv 2104.09864, eq. 34; halves as in GPT-NeoX)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
