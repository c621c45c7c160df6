"""The TPU kernels of chunk_topk and chunk_sparse_attention, compiled for TPUs without one."""

import jax
import jax.numpy as jnp
import pytest
import test_aot_tpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention, shapes
from pallas_kernels.chunk_topk import chunk_topk
from pallas_kernels.chunk_topk.shapes import SHAPES as TOPK_SHAPES

pytestmark = test_aot_tpu.pytestmark
mesh_of = test_aot_tpu.mesh_of

CHIPS = ("v5e", "v6e", "tpu7x")
DEFAULT = {("v5e", "hsa-240m"), ("v6e", "tiny")}
TOPK_DEFAULT = {("v5e", "hsa-240m", "bfloat16"), ("v6e", "tiny", "float32")}


def compiled(mesh, f, arrays):
    """The program of f and of its kernels, for a device of the mesh."""
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
              for name, x in arrays.items()}
    with jax.set_mesh(mesh):
        text = jax.jit(f).trace(arrays).lower().compile().as_text()
    return "\n".join(line for line in text.splitlines() if "tpu_custom_call" in line)


def attention_gradients(mesh, shape, dtype=jnp.bfloat16, joint=False, **options):
    def loss(floats, indices):
        o = chunk_sparse_attention(
            **floats, indices=indices, chunk_size=shape.chunk_size, **options)
        return (o.astype(jnp.float32) ** 2).sum()

    arrays = shape.arrays(B=1, dtype=dtype)
    if joint:
        del arrays["weights"]
    split = lambda arrays: ({k: x for k, x in arrays.items() if k != "indices"}, arrays["indices"])
    kernels = compiled(mesh, lambda arrays: jax.grad(loss)(*split(arrays)), arrays)
    return {name for name in ("forward", "backward") if f"attention_{name}" in kernels}


@pytest.mark.parametrize(
    "chip, name",
    [pytest.param(chip, name, marks=() if (chip, name) in DEFAULT else pytest.mark.slow)
     for chip in CHIPS for name in ("tiny", "hsa-240m", "hsa-345m")],
)
def test_attention_compiles(chip, name, mesh_of):
    got = attention_gradients(mesh_of(chip), shapes.SHAPES[name])
    assert got == {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("change", [dict(K=96, G=2, J=3), dict(K=256, G=4, T=1000, chunk_size=8)])
def test_odd_attention_compiles(chip, change, mesh_of):
    shape = shapes.SHAPES["tiny"]._replace(**change)
    got = attention_gradients(
        mesh_of(chip), shape, jnp.float32, joint=True, off_by_one=True, implementation="tpu")
    assert got == {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", [
    "chunk_sparse_attention_forward", "chunk_sparse_attention_backward", "chunk_topk"])
def test_nothing_is_spilled(kernel, chip):
    call = f"meter({kernel!r}, {chip!r}, 'hsa-345m')"
    assert test_aot_tpu.spills("static_kernels_chunks", call) == 0


@pytest.mark.parametrize(
    "chip, name, dtype",
    [pytest.param(chip, name, dtype, marks=() if (chip, name, dtype) in TOPK_DEFAULT
                  else pytest.mark.slow)
     for chip in CHIPS for name in TOPK_SHAPES for dtype in ("bfloat16", "float32")],
)
def test_topk_compiles(chip, name, dtype, mesh_of):
    """Packed rows, with noise, and the gradient by queries and landmarks."""
    shape = TOPK_SHAPES[name]
    ids = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)
    arrays = shape.arrays(B=1, dtype=jnp.dtype(dtype)) | dict(
        segments=ids(shape.T), chunk_segments=ids(shape.T // shape.chunk_size))

    def gradients(arrays):
        def loss(q, landmarks):
            indices, scores = chunk_topk(
                q, landmarks, k=shape.k, chunk_size=shape.chunk_size, segments=arrays["segments"],
                chunk_segments=arrays["chunk_segments"], noise_key=jax.random.key(0))
            return jnp.where(indices < 0, 0, scores).sum()

        return jax.grad(loss, (0, 1))(arrays["q"], arrays["landmarks"])

    assert "chunk_topk" in compiled(mesh_of(chip), gradients, arrays)
