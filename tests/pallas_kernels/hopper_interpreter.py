"""Hopper kernels in JAX's interpreter, which knows neither products added to what is not zero nor
operands of products in registers."""

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper


def interprets() -> bool:
    return hasattr(plgpu, "force_gpu_interpret_mode")


@contextlib.contextmanager
def interpreted(monkeypatch):
    """For a target that is no GPU, with detection of races."""
    exact = hopper.mma

    def product(shape, a, b):
        if not isinstance(a, jax.Array):
            return exact(shape, (a, b))

        def staged(tile):
            tile[...] = a
            plgpu.commit_smem()
            return exact(shape, (tile, b))

        return pl.run_scoped(staged, hopper.tile(*a.shape))

    def mma(shape, *pairs):
        return sum(product(shape, a, b) for a, b in pairs)

    monkeypatch.setattr(hopper, "mma", mma)
    monkeypatch.setattr(hopper, "mma_add", lambda x, *pairs: x + mma(x.shape, *pairs))
    monkeypatch.setattr(hopper, "refuse_target", lambda: None)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def call(kernel, x, scratch):
    """A kernel of one thread block, from an f32 array to one like it."""
    return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, jnp.float32),
                        scratch_types=scratch, grid=(1,), grid_names=("block",),
                        compiler_params=hopper.COMPILER_PARAMS)(x)
