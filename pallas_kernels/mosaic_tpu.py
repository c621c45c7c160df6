"""What the Mosaic TPU kernels share: the width of a vector, products, and calls."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
VMEM = 40 * 2**20  # bytes, where much waits in scratch: the default, 16 MiB, is too few
NN, NT, TN = (1, 0), (1, 1), (0, 0)  # which dimension of each matrix a product sums over


def dot(a, b, contract):
    """A product of matrices in f32; `contract` names a dimension of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())),
                           precision=precision, preferred_element_type=jnp.float32)


def unknown_zero():
    """Zero, which the compiler cannot tell: an index of scratch whose contents are to stay in VMEM.

    What is stored at places that it knows it would keep in registers, and spill. It is made of the
    grid's third axis, along a row: one of a single step, as heads on a device may be, is known.
    """
    return jnp.minimum(pl.program_id(2), 0)


def strictly_lower(x):
    i, j = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(j < i, x, 0.0)


def sum_columns(x):
    """[C, K] -> [1, K]."""
    return jnp.sum(x, axis=0, keepdims=True)


def as_column(row):
    """[1, C] -> [C, LANES], each number in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def flat(x, block):
    """[B, T, H, K] -> [B, T, H K]; T padded with zeros to blocks, K to lanes."""
    B, T, H, K = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, -K % LANES)))
    return x.reshape(B, T + -T % block, -1)


def call(kernel, name, specs, inputs, outputs, arrays, shapes, grid, scratch=(), **options):
    """Runs a kernel whose last grid axis is in order; `inputs` and `outputs` name block specs."""
    semantics = ("parallel",) * (len(grid) - 1) + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs[x] for x in inputs],
        out_specs=[specs[x] for x in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, **options),
        name=name,
    )(*arrays)
