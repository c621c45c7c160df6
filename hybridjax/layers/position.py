"""Rotary position embedding, exact to position 2**25.

At position 16 million, f32 `position * frequency` is noise. So positions stay integers of three
digits of base 512; the angles of each digit are tabulated on the host in f64, and the rotations are
composed: cos(a + b) = cos a cos b - sin a sin b. The tables stay small, since a TPU compiler hands
lookups in large ones to other units.
"""

import functools
import inspect
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.sharding import current_spec

MAX_POSITION = 2**25
_BASE = 512

Scaling = tuple[tuple[str, Any], ...]  # the items of Hugging Face's `rope_scaling`


@functools.cache
def frequencies(width: int, theta: float, scaling: Scaling = ()) -> Float[np.ndarray, " half"]:
    """Radians per position of each rotated pair, in f64."""
    if width < 2 or width % 2:
        raise UserError(f"rotary positions need an even number of dimensions, not {width}")
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    options = dict(scaling)
    kind = options.pop("rope_type", "default")
    if kind not in SCALINGS:
        raise UserError(f"no rope_scaling of type {kind!r}: there are {', '.join(SCALINGS)}")
    known = dict(inspect.signature(SCALINGS[kind]).parameters)
    del known["plain"]
    needed = {name for name, option in known.items() if option.default is option.empty}
    if not needed <= set(options) <= set(known):
        raise UserError(f"rope_scaling {kind!r} takes {sorted(known)}, not {sorted(options)}")
    return SCALINGS[kind](plain, **options)


def _linear(plain: np.ndarray, factor: float) -> np.ndarray:
    """Positions are interpolated (arXiv 2306.15595)."""
    return plain / factor


def _llama3(
    plain: np.ndarray,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """Llama 3.1's: a wave that fits fewer than `low_freq_factor` times into the original context is
    slowed by `factor`, one that fits `high_freq_factor` times is kept, others are in between."""
    waves = original_max_position_embeddings * plain / (2 * math.pi)
    kept = np.clip((waves - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return plain * (kept + (1 - kept) / factor)


def _yarn(
    plain: np.ndarray,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    attention_factor: float | None = None,  # what `amplitude` reads
) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): as in `transformers`, the ramp between pairs that turn
    `beta_fast` times in the original context, kept, and `beta_slow` times, slowed by `factor`,
    is linear in their number and begins and ends at whole ones."""
    if plain.size < 2:
        raise UserError("rope_scaling 'yarn' needs at least 4 rotated dimensions")
    per_pair = -math.log(plain[1])
    whole_turn = original_max_position_embeddings / (2 * math.pi)
    pair_of = lambda turns: math.log(whole_turn / turns) / per_pair
    first = max(math.floor(pair_of(beta_fast or 32)), 0)
    last = min(math.ceil(pair_of(beta_slow or 1)), 2 * plain.size - 1)
    slowed = np.clip((np.arange(plain.size) - first) / max(last - first, 1e-3), 0, 1)
    return plain * (1 - slowed + slowed / factor)


SCALINGS = {
    "default": lambda plain: plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def amplitude(scaling: Scaling) -> float:
    """What rotated queries and keys are multiplied by: YaRN's temperature (its eq. 22), else 1."""
    options = dict(scaling)
    if options.get("rope_type") != "yarn":
        return 1.0
    given = options.get("attention_factor")
    return 1 + 0.1 * math.log(max(options["factor"], 1)) if given is None else given


@functools.cache
def _table(stride: int, width: int, theta: float, scaling: Scaling) -> np.ndarray:
    """cos and sin of `stride * n * frequency` for the digits n: `[_BASE, 2, width / 2]` in f32."""
    frequency = frequencies(width, theta, scaling)
    angle = stride * np.arange(_BASE, dtype=np.float64)[:, None] * frequency
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def rotary_angles(
    positions: Int[Array, "B T"], width: int, theta: float, scaling: Scaling = ()
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of each position's angles, times the scaling's amplitude, in f32.

    There is an axis for the heads.
    """

    def turn(stride: int) -> tuple[Array, Array]:
        table = _table(stride, width, theta, scaling)
        cos, sin = jnp.moveaxis(_lookup(table, positions // stride % _BASE), 2, 0)
        return cos, sin

    cos, sin = turn(1)
    for c, s in (turn(_BASE), turn(_BASE**2)):
        cos, sin = cos * c - sin * s, sin * c + cos * s
    if (size := amplitude(scaling)) != 1:
        cos, sin = size * cos, size * sin
    return cos[:, :, None], sin[:, :, None]


def _lookup(table: np.ndarray, index: Int[Array, "B T"]) -> Float[Array, "B T 2 half"]:
    out = current_spec(("batch", "length", None, None), (*index.shape, *table.shape[1:]))
    return jnp.asarray(table).at[index].get(out_sharding=out)


def rotate(
    x: Float[Array, "B T H K"],
    angles: tuple[Float[Array, "B T 1 half"], ...],
    interleaved: bool = False,
) -> Float[Array, "B T H K"]:
    """Rotates the first dimensions in pairs, two per angle (arXiv 2104.09864, eq. 34).

    The pairs are (x_i, x_{i + width/2}), the halves of GPT-NeoX, or, interleaved as in the paper
    and in GLM, (x_{2i}, x_{2i+1}).
    """
    cos, sin = angles
    turned, rest = jnp.split(x.astype(jnp.float32), [2 * cos.shape[-1]], axis=-1)
    halves = (turned[..., 0::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, -1)
    first, second = halves
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        rotated = [jnp.stack(rotated, axis=-1).reshape(turned.shape)]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x.dtype)
