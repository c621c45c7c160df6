"""The inverse of unit lower triangular matrices, by blocks."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.precision import full_precision

_SMALL = 16  # up to here whole blocks are multiplied with a mask: few operations, little waste


def unit_lower_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """`(I + a)^-1` for a strictly lower triangular `a`, C a power of two.

    Inverses X, Y of neighbouring diagonal blocks merge into that of the block of both:

        [[P, 0], [a, Q]]^-1 = [[X, 0], [-Y a X, Y]]

    As exact as substitution. The shorter product (I - a)(I + a^2)(I + a^4)... is not: where keys
    resemble one another the powers of `a` grow far beyond their sum.
    """
    with full_precision():
        return _inverse(a)


def _inverse(a):
    C = a.shape[-1]
    size = min(C, _SMALL)
    x = _small_inverse(_diagonal(a, size))
    while size < C:
        off = _diagonal(a, 2 * size)[..., size:, :size]
        x = x.reshape(*x.shape[:-3], -1, 2, size, size)
        first, second = x[..., 0, :, :], x[..., 1, :, :]
        lower = jnp.concatenate([-second @ (off @ first), second], axis=-1)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        x = jnp.concatenate([upper, lower], axis=-2)
        size *= 2
    return x[..., 0, :, :]


def _diagonal(a, size):
    """The diagonal blocks [*B, C / size, size, size]."""
    starts = range(0, a.shape[-1], size)
    return jnp.stack([a[..., i : i + size, i : i + size] for i in starts], axis=-3)


def _small_inverse(a):
    """The same merges as products of whole blocks, of which the mask keeps `a`'s part."""
    C = a.shape[-1]
    i = np.arange(C)
    x = jnp.broadcast_to(jnp.eye(C, dtype=a.dtype), a.shape)
    size = 1
    while size < C:
        merged = (i[:, None] // size % 2 == 1) & (i[:, None] // size - 1 == i // size)
        off = jnp.where(merged, a, 0)
        x = x - (off if size == 1 else x @ (off @ x))
        size *= 2
    return x
