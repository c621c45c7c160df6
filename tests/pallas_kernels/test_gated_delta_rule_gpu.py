"""The gated delta rule's Hopper kernels without a GPU: numbers and races in interpret mode."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import targeting

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import hopper_interpreter  # noqa: E402

from pallas_kernels import hopper  # noqa: E402
from pallas_kernels.gated_delta_rule import gated_delta_rule, gpu_chunks  # noqa: E402

interprets = pytest.mark.skipif(
    not hopper_interpreter.interprets(),
    reason=f"jax {jax.__version__} has no interpret mode for Mosaic GPU")
SMALL = cases.Case(70, (64, 64), (1, 1, 1), "mixed", "two", "packed", "bfloat16")
SERVED = [case for case in cases.ALL if case.dtype == "bfloat16" and case.widths[0] <= 128]
CASES = [SMALL, *cases.pairwise(SERVED),
         cases.Case(70, (96, 256), (1, 1, 2), "some", "some", "packed", "bfloat16")]


@interprets
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case is SMALL else pytest.mark.slow)
             for case in CASES])
def test_gpu_is_the_oracle_in_interpret_mode(case, monkeypatch):
    expected = cases.oracle(case)
    with hopper_interpreter.interpreted(monkeypatch):
        cases.assert_close(cases.run(case, "gpu"), expected, case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_is_the_oracle_on_a_gpu(case):
    cases.assert_close(cases.run(case, "gpu"), cases.oracle(case), case.dtype)


@interprets
@pytest.mark.parametrize("beta", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_keys_that_repeat_cost_no_precision(beta, monkeypatch):
    """All keys of a chunk are one: the powers of the system's matrix are largest."""
    C = hopper.C
    a = np.tril(np.full((C, C), beta, np.float32), -1)

    def kernel(a, out, factor, product):
        x = hopper.load(a, optimized=False)
        out[...] = gpu_chunks.unit_lower_inverse(x, factor, product)

    with hopper_interpreter.interpreted(monkeypatch):
        inverse = hopper_interpreter.call(
            kernel, a, scratch=[hopper.tile(2, C, C), hopper.tile(2, C, C)])
    expected = np.linalg.inv(np.eye(C) + a.astype(np.float64))
    np.testing.assert_allclose(inverse, expected, atol=1e-4)


def arguments(dtype=jnp.bfloat16, T=10, K=64, V=64):
    array = lambda dtype, *width: jax.ShapeDtypeStruct((1, T, 2, *width), dtype)
    return dict(q=array(dtype, K), k=array(dtype, K), v=array(dtype, V), beta=array(jnp.float32))


def rule(q, k, v, beta, **options):
    return gated_delta_rule(q, k, v, beta, -beta, **options)[0]


@pytest.mark.parametrize(
    "device, arrays, options, reason",
    [
        (None, dict(), dict(), "serves GPU only, the target is cpu"),
        ("NVIDIA A100-SXM4-80GB", dict(), dict(), "Hopper only .* the target is NVIDIA A100"),
        ("NVIDIA H200", dict(dtype=jnp.float32), dict(), "needs v in bfloat16 .* got float32"),
        ("NVIDIA H200", dict(K=192), dict(), "needs K up to 128 .* got 192 and 64"),
        ("NVIDIA H200", dict(V=512), dict(), "V up to 256, got 64 and 512"),
        ("NVIDIA H200", dict(T=2**22), dict(), "up to 4194240 tokens, got 4194304: give"),
        ("NVIDIA H200", dict(), dict(chunk_size=32), "by chunks of 64, got chunk_size 32"),
    ],
)
def test_what_the_gpu_cannot_serve_is_refused_with_the_reason(device, arrays, options, reason):
    with targeting(device):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(functools.partial(rule, **options, implementation="gpu"),
                           **arguments(**arrays))


@pytest.mark.parametrize("device, kernels", [("NVIDIA H200", 6), ("NVIDIA A100-SXM4-80GB", 0)])
def test_on_hopper_it_is_taken_and_lowers_elsewhere_xla_is(device, kernels):
    def loss(arrays):
        return (rule(**arrays).astype(jnp.float32) ** 2).sum()

    with targeting(device):
        lowered = jax.jit(jax.grad(loss)).trace(arguments()).lower(lowering_platforms=("cuda",))
    assert len(re.findall("custom_call @mosaic_gpu", lowered.as_text())) == kernels
