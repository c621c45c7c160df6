"""What the Mosaic GPU kernels for Hopper share: whom they serve, tiles, and products by wgmma.

A matrix in shared memory is bf16, its columns a multiple of 64; in registers it is one
warpgroup's. Operands of products are bf16, sums f32.
"""

import inspect
import re

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import target_kind, target_platform

C = 64  # tokens per chunk, the rows of a product
COLUMNS = 64  # of a tile: a swizzle of 128 bytes
TRANSFORMS = plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128)
LAYOUT = plgpu.Layout.WGMMA
ROWS, COLS = LAYOUT.reduce(1), LAYOUT.reduce(0)
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def refuse_target():
    """Raises NotImplementedError unless what is compiled for is a Hopper GPU."""
    if target_platform() != "gpu":
        raise NotImplementedError(f"serves GPU only, the target is {target_platform()}")
    if not re.search(r"\bG?H(100|200|800|20)\b", kind := target_kind()):
        raise NotImplementedError(
            f"serves Hopper only (compute capability 9.0), the target is {kind}")


def tile(*shape):
    """Shared memory for matrices that take part in products."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)


def mma(shape, *pairs):
    """The sum of the products `a b` of the pairs, f32 in registers; an `a` may be there too."""
    def products(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))


def mma_add(x, *pairs):
    """`x` and that sum, in x's registers. The interpreter knows neither it nor `a` in registers."""
    def products(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(products)(plgpu.ACC.init(x))


def load(ref, layout=LAYOUT, **options):
    # Until jax 0.11 the index was an argument of its own.
    index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []
    return plgpu.load(ref, *index, layout=layout, **options)


def load_f32(ref, **options):
    return load(ref, **options).astype(jnp.float32)


def across(ref, columns=C):
    """A number per row as a matrix [C, columns]."""
    return lax.broadcast_in_dim(load(ref, ROWS), (C, columns), [0])


def down(ref):
    """A number per column as a matrix [C, C]."""
    return lax.broadcast_in_dim(load(ref, COLS), (C, C), [1])


def indices():
    """The row and the column of each entry of a matrix [C, C]."""
    return [plgpu.broadcasted_iota(jnp.int32, (C, C), axis, layout=LAYOUT) for axis in (0, 1)]
