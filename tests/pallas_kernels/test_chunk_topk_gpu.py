"""The Hopper kernel of chunk_topk without a GPU: numbers, races, refusals."""

import functools

import jax
import jax.numpy as jnp
import pytest
import test_chunk_topk as table
from targets import targeting

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import hopper_interpreter  # noqa: E402

from pallas_kernels.chunk_topk import chunk_topk  # noqa: E402

interprets = pytest.mark.skipif(
    not hopper_interpreter.interprets(),
    reason=f"jax {jax.__version__} has no interpret mode for Mosaic GPU")
CASES = {name: {} for name in table.CASES if name != "short"}
CASES["wide"] = dict(R=130)  # several parts of a landmark
DEFAULT = ("window-in-documents",)


def check(name):
    arrays, weights, options = table.make(name, **table.CASES[name] | CASES[name])
    got = table.run(arrays, weights, options, "gpu", jnp.bfloat16)
    table.assert_close(got, table.expected(name, "bfloat16", **CASES[name]), 3e-3)


@interprets
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
             for name in CASES])
def test_gpu_is_the_reference_in_interpret_mode(name, monkeypatch):
    with hopper_interpreter.interpreted(monkeypatch):
        check(name)


@interprets
def test_gpu_gives_ties_to_the_later_chunk(monkeypatch):
    with hopper_interpreter.interpreted(monkeypatch):
        table.check_ties("gpu", jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_the_reference_on_a_gpu(name):
    check(name)


def arguments(dtype=jnp.bfloat16, R=64, N=16):
    array = lambda length: jax.ShapeDtypeStruct((1, length, 1, R), dtype)
    return array(1024), array(N)


@pytest.mark.parametrize(
    "device, arrays, k, reason",
    [
        (None, dict(), 8, "serves GPU only, the target is cpu"),
        ("NVIDIA A100-SXM4-80GB", dict(), 8, "Hopper only .* the target is NVIDIA A100"),
        ("NVIDIA H200", dict(dtype=jnp.float32), 8, "needs bfloat16 .* got float32 and float32"),
        ("NVIDIA H200", dict(N=0), 8, "needs at least one chunk"),
        ("NVIDIA H200", dict(R=1088), 8, "up to 1024 wide and k up to 64, got 1088 and 8"),
        ("NVIDIA H200", dict(), 65, "up to 1024 wide and k up to 64, got 64 and 65"),
    ],
)
def test_what_the_gpu_cannot_serve_is_refused_with_the_reason(device, arrays, k, reason):
    op = functools.partial(chunk_topk, k=k, chunk_size=64, implementation="gpu")
    with targeting(device), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(op, *arguments(**arrays))


@pytest.mark.parametrize("device, kernels", [("NVIDIA H200", 1), ("NVIDIA A100-SXM4-80GB", 0)])
def test_on_hopper_it_is_taken_and_lowers_elsewhere_xla_is(device, kernels):
    def loss(q, landmarks):
        indices, scores = chunk_topk(q, landmarks, k=8, chunk_size=64,
                                     noise_key=jax.random.key(0))
        return jnp.where(indices < 0, 0, scores).sum()

    with targeting(device):
        lowered = jax.jit(jax.grad(loss)).trace(*arguments()).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels
