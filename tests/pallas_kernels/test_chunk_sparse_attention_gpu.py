"""The Hopper kernels of attention over chosen chunks without a GPU: numbers, races, refusals."""

import functools

import jax
import jax.numpy as jnp
import pytest
import test_chunk_sparse_attention as table
from targets import targeting

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import hopper_interpreter  # noqa: E402

from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention, gpu  # noqa: E402

interprets = pytest.mark.skipif(
    not hopper_interpreter.interprets(),
    reason=f"jax {jax.__version__} has no interpret mode for Mosaic GPU")
CASES = [name for name in table.CASES if name != "no-memory"]
DEFAULT = ("own-chunk-weighted",)
# Few queries, in interpret mode; with 64 heads each is a step of the chunk that all choose.
FEW = {name: dict(T=6) for name in CASES} | {"popular-chunk": dict(T=6, H=64), "one-token": {}}


def check(name, **change):
    arrays, indices, do, options = table.make(name, **table.CASES[name] | change)
    got = table.run(table.narrowed(arrays, "bfloat16"), indices, do, options, "gpu")
    table.assert_close(got, table.expected(name, "bfloat16", **change), "bfloat16")


@interprets
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
             for name in CASES])
def test_gpu_is_the_reference_in_interpret_mode(name, monkeypatch):
    parts = 1 if name == "popular-chunk" else 2
    monkeypatch.setattr(gpu, "BLOCKS", 10 * parts)
    with hopper_interpreter.interpreted(monkeypatch):
        check(name, **FEW[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_the_reference_on_a_gpu(name):
    check(name)


def arguments(dtype=jnp.bfloat16, T=256, K=64, H=16, N=4):
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
    kv = array(dtype, N * 64, 1, K)
    return dict(q=array(dtype, T, H, K), k=kv, v=kv, indices=array(jnp.int32, T, 1, 2),
                weights=array(jnp.float32, T, 1, 2))


@pytest.mark.parametrize(
    "device, arrays, chunk_size, reason",
    [
        (None, dict(), 64, "serves GPU only, the target is cpu"),
        ("NVIDIA A100-SXM4-80GB", dict(), 64, "Hopper only .* the target is NVIDIA A100"),
        ("NVIDIA H200", dict(dtype=jnp.float32), 64, "needs bfloat16 .* got float32, float32"),
        ("NVIDIA H200", dict(K=192), 64, "needs K and V up to 128 .* got 192 and 192"),
        ("NVIDIA H200", dict(), 128, "chunks of up to 64 keys, got chunk_size 128"),
        ("NVIDIA H200", dict(H=128), 64, "up to 64 query heads for each of keys, got 128 for 1"),
        ("NVIDIA H200", dict(N=0), 64, "needs at least one chunk"),
        ("NVIDIA H200", dict(T=2**26), 64, "in 32 bits, got 2147483648 in a row"),
    ],
)
def test_what_the_gpu_cannot_serve_is_refused_with_the_reason(device, arrays, chunk_size, reason):
    op = functools.partial(chunk_sparse_attention, chunk_size=chunk_size, implementation="gpu")
    with targeting(device), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(op, **arguments(**arrays))


@pytest.mark.parametrize("device, kernels", [("NVIDIA H200", 3), ("NVIDIA A100-SXM4-80GB", 0)])
def test_on_hopper_it_is_taken_and_lowers_elsewhere_xla_is(device, kernels):
    def loss(floats, indices):
        o = chunk_sparse_attention(**floats, indices=indices, chunk_size=64)
        return (o.astype(jnp.float32) ** 2).sum()

    floats = arguments()
    indices = floats.pop("indices")
    with targeting(device):
        lowered = jax.jit(jax.grad(loss)).trace(floats, indices).lower(
            lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels
