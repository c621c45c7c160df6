"""The inverse of unit lower triangular matrices inside a TPU kernel.

As in `triangular.py`, blocks are merged, those of one size all at once:

    [[L, 0], [M, R]]^-1 = [[X, 0], [-Y M X, Y]]        with X, Y the inverses of L and R

and those of 16 are inverted by substitution. The blocks M, and the Y, of one size lie side by side,
[size, C], and are multiplied by a matrix [C, C] that has the X on its diagonal. In VMEM matrices
are sums of parts: of one in float32, or else of two in bfloat16, since where keys resemble one
another the 8 bits of one are too few.

What works in turns with other chains of operations is a generator that yields where its next
operation waits for the last one: see `lockstep`.
"""

import itertools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import NN, dot

_BLOCK = 16


def lockstep(chains):
    """Runs generators from `yield` to `yield` in turns.

    The compiler hardly reorders over long distances: chains written one after the other would each
    wait for their own latencies.
    """
    for _ in together(chains):
        pass


def together(chains):
    """As one generator."""
    return itertools.zip_longest(*chains)


def scratch(chunks, heads, C, exact):
    """By name: of blocks on the diagonal, as they are inverted, and of those to merge them with."""
    dtype, parts = (jnp.float32, 1) if exact else (jnp.bfloat16, 2)
    keep = lambda rows: pltpu.VMEM((chunks, heads, parts, rows, C), dtype)
    return dict(diagonal=keep(C), lower=keep(max(_BLOCK, C - _BLOCK)))


def block_inverses(a, diagonal, lower):
    """Leaves the inverses of the blocks of 16 of `I + strictly_lower(a)` in `diagonal`.

    `a(rows)` gives rows of the matrix. What else than those blocks there is of it waits in `lower`.
    """
    C = diagonal.shape[-1]
    block = lax.broadcasted_iota(jnp.int32, (_BLOCK, C), 1) >> 4
    x = jnp.zeros((_BLOCK, C))
    for n in range(C // _BLOCK):
        x = jnp.where(block == n, a(_rows(n)), x)
    yield
    for level in range(_levels(C)):
        size = 1 << level  # in blocks
        for n in range(size, 2 * size):
            rows = a(_rows(n))
            for more in range(n + 2 * size, C // _BLOCK, 2 * size):
                left = block >> level == (more >> level) - 1
                rows = jnp.where(left, a(_rows(more)), rows)
            _store(lower, _rows(n - 1), rows)
        yield
    x = yield from _substitute(x)
    for part, values in enumerate(_split(x, diagonal)):
        values = values.astype(jnp.float32)
        for n in range(C // _BLOCK):
            diagonal[part, _rows(n)] = jnp.where(block == n, values, 0.0).astype(diagonal.dtype)


def _rows(n):
    return slice(n * _BLOCK, (n + 1) * _BLOCK)


def _substitute(a):
    """The inverses of I + strictly lower blocks side by side, [16, C]."""
    i, j = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))
    within = j & (_BLOCK - 1)
    a = jnp.where(within < i, a, 0.0)
    x = jnp.where(i == within, 1.0, 0.0)
    half = _BLOCK // 2  # as many rows are a vector
    for row in range(_BLOCK - 1):
        rest = (row + 1) // half * half
        factor = jnp.take_along_axis(a[rest:], (j - within + row)[rest:], axis=1)
        change = x[rest:] - factor * x[row:row + 1]
        x = jnp.concatenate([x[:rest], change]) if rest else change
        yield
    return x


def _levels(C):
    return (C // _BLOCK).bit_length() - 1


def merge(diagonal, lower, inverse):
    """The inverse of the whole from those of blocks."""
    C = inverse.shape[-1]
    for level in range(_levels(C)):
        size = _BLOCK << level
        yield from _merge(diagonal, lower.at[:, size - _BLOCK:2 * size - _BLOCK], size,
                          inverse if 2 * size == C else None)
    if C == _BLOCK:
        inverse[...] = diagonal[0]


def _merge(diagonal, lower, size, inverse):
    """To blocks of twice the size, whose lower left ones M X waits in on its way to -Y M X."""
    C = diagonal.shape[-1]
    column = lax.broadcasted_iota(jnp.int32, (size, C), 1)
    rights = [slice(first, first + size) for first in range(size, C, 2 * size)]
    left_of = lambda rows: (column >= rows.start - size) & (column < rows.start)
    right_of = lambda rows: (column >= rows.start) & (column < rows.stop)

    def put(product):
        for rows in rights:
            _store(diagonal, rows, jnp.where(left_of(rows), product, _load(diagonal, rows)))

    put(_product([lower[n] for n in range(lower.shape[0])], diagonal))
    yield
    y = sum(jnp.where(right_of(rows), _load(diagonal, rows), 0.0) for rows in rights)
    product = -_product(_split(y, diagonal), diagonal)
    if inverse is None:
        put(product)
    else:
        inverse[:size] = diagonal[0, :size]
        inverse[size:] = jnp.where(column < size, product, y).astype(inverse.dtype)
    yield


def _product(x, parts):
    """The product of sums of parts."""
    if len(x) == 1:
        return dot(x[0], parts[0], NN)
    high, low = x
    both = parts[...].reshape(-1, parts.shape[-1])
    return dot(jnp.concatenate([high, high], axis=1), both, NN) + dot(low, parts[0], NN)


def _load(parts, rows):
    return sum(parts[n, rows].astype(jnp.float32) for n in range(parts.shape[0]))


def _store(parts, rows, x):
    for n, part in enumerate(_split(x, parts)):
        parts[n, rows] = part


def _split(x, like):
    parts = []
    for _ in range(like.shape[0]):
        parts.append(x.astype(like.dtype))
        x -= parts[-1].astype(jnp.float32)
    return parts
