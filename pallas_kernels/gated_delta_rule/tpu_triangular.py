"""The inverse of unit lower triangular matrices inside a TPU kernel.

As in `triangular.py`, blocks are merged; those of 16 are inverted by substitution, side by side.
Everything here is a generator that yields where its next operation waits for the last one, so that
other chains of operations may be written between them: see `lockstep`.
"""

import itertools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_tpu import NN, dot

_BLOCK = 16


def lockstep(chains):
    """Runs generators from `yield` to `yield` in turns.

    The compiler hardly reorders over long distances: chains written one after the other would each
    wait for their own latencies.
    """
    for _ in itertools.zip_longest(*chains):
        pass


def unit_lower_inverse(a, exact):
    """`(I + a)^-1` for a strictly lower triangular `a` [C, C], as in `triangular.py`."""
    C = len(a)
    block = lax.broadcasted_iota(jnp.int32, (_BLOCK, C), 1) >> 4
    diagonal = jnp.zeros((_BLOCK, C))
    for index in range(C // _BLOCK):
        rows = a[index * _BLOCK:(index + 1) * _BLOCK]
        diagonal = jnp.where(block == index, rows, diagonal)
    x = yield from _block_inverses(diagonal)
    x = jnp.concatenate([jnp.where(block == index, x, 0.0) for index in range(C // _BLOCK)])
    size = _BLOCK
    while size < C:
        x = yield from _merge(a, x, size, exact)
        size *= 2
    return x


def _block_inverses(a):
    """The inverses of I + blocks side by side, [16, C], by substitution."""
    i, j = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))
    within = j & (_BLOCK - 1)
    x = jnp.where(i == within, 1.0, 0.0)
    for row in range(_BLOCK - 1):
        x -= jnp.take_along_axis(a, j - within + row, axis=1) * x[row:row + 1]
        yield
    return x


def _merge(a, x, size, exact):
    """Inverses of diagonal blocks of twice the size: [[X, 0], [-Y a X, Y]]."""
    C = len(a)
    column = lax.broadcasted_iota(jnp.int32, (size, C), 1)
    lower = range(size, C, 2 * size)
    nothing = jnp.zeros((size, C))

    def spread(rows):
        blocks = [rows[n * size:(n + 1) * size] for n in range(len(lower))]
        return jnp.concatenate([x for block in blocks for x in (nothing, block)])

    off = jnp.concatenate([jnp.where((column >= i - size) & (column < i), a[i:i + size], 0.0)
                           for i in lower])
    product = _product(off, x, exact)
    yield
    product = _product(jnp.concatenate([x[i:i + size] for i in lower]), spread(product), exact)
    yield
    return x - spread(product)


def _product(a, b, exact):
    """Of f32; if not `exact`, to 16 bits: where keys resemble one another, 8 are too few."""
    if exact:
        return dot(a, b, NN)
    (a, a_rest), (b, b_rest) = _split(a), _split(b)
    return dot(a, b, NN) + (dot(a, b_rest, NN) + dot(a_rest, b, NN))


def _split(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
