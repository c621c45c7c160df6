"""The Triton kernels without a GPU: numbers in Triton's interpreter, and what is refused."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from linear_attention_cases import TABLE, assert_is_the_oracle
from targets import targeting

from benchmarks import static_kernels_triton
from pallas_kernels.linear_attention import linear_attention

TRITON = "pallas_kernels.linear_attention.triton"
CASES = list(TABLE)[:40]
interprets = pytest.mark.skipif(
    triton_interpreter.missing() is not None, reason=str(triton_interpreter.missing()))


@interprets
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if i < 4 else pytest.mark.slow)
             for i, case in enumerate(CASES)])
def test_triton_is_the_oracle_in_the_interpreter(case, monkeypatch):
    triton_interpreter.interpreted(monkeypatch, TRITON)
    monkeypatch.setattr(f"{TRITON}._refuse_target", lambda: None)
    # A program costs the interpreter the same whatever its tile; 256 is two of these.
    monkeypatch.setattr(f"{TRITON}_kernels.SIDE", dict.fromkeys(("bfloat16", "float32"), 128))
    monkeypatch.setattr(f"{TRITON}_kernels.DEPTH", 128)
    assert_is_the_oracle(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_triton_is_the_oracle_on_a_gpu(case):
    assert_is_the_oracle(case, "triton")


def attend(q, k, v, scale=None, chunk_size=None, implementation=None):
    return linear_attention(q, k, v, -np.ones(2), scale=scale, chunk_size=chunk_size,
                            implementation=implementation)[0]


def arguments(dtype=jnp.bfloat16, K=64, V=64):
    x = jax.ShapeDtypeStruct((1, 70, 2, K), dtype)
    return dict(q=x, k=x, v=jax.ShapeDtypeStruct((1, 70, 2, V), dtype))


@pytest.mark.parametrize(
    "device, arrays, options, reason",
    [
        (None, dict(), dict(), "serves GPU only, the target is cpu"),
        ("Tesla T4", dict(), dict(), "compute capability 8.0 and more, the target is Tesla T4"),
        ("NVIDIA GeForce RTX 2080 Ti", dict(), dict(), "the target is NVIDIA GeForce RTX 2080"),
        ("AMD Instinct MI300X", dict(), dict(), "serves NVIDIA GPUs .* AMD Instinct MI300X"),
        ("NVIDIA L4", dict(dtype=jnp.float16), dict(), "all bfloat16 or all float32, got float16"),
        ("NVIDIA L4", dict(), dict(chunk_size=24), "16, 32 or 64, got chunk_size 24"),
    ],
)
def test_what_triton_cannot_serve_is_refused_with_the_reason(
        device, arrays, options, reason, monkeypatch):
    triton_interpreter.traced(monkeypatch, TRITON)
    with targeting(device), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(attend, **options, implementation="triton"),
                       **arguments(**arrays))


def test_a_traced_scale_is_refused(monkeypatch):
    triton_interpreter.traced(monkeypatch, TRITON)
    with targeting("NVIDIA L4"), pytest.raises(NotImplementedError, match="known at compile time"):
        jax.eval_shape(functools.partial(attend, implementation="triton"), **arguments(), scale=1.0)


def test_versions_that_do_not_work_together_are_refused(monkeypatch):
    triton_interpreter.traced(monkeypatch, TRITON, version=(0, 4, 1))
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    with targeting("NVIDIA L4"), pytest.raises(
            NotImplementedError, match="jax-triton 0.4.1 cannot lower .* needs jax 0.10 or 0.11"):
        jax.eval_shape(functools.partial(attend, implementation="triton"), **arguments())


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None,
                    reason="jax-triton is installed")
def test_without_jax_triton_a_name_is_refused():
    with pytest.raises(NotImplementedError, match="cannot be imported"):
        jax.eval_shape(functools.partial(attend, implementation="triton"), **arguments())


@pytest.mark.parametrize(
    "device, dtype, kernels",
    [
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 7),  # states twice, their gradients; o, dq, dk, dv
        ("NVIDIA GeForce RTX 4090", jnp.float32, 7),
        ("Tesla T4", jnp.bfloat16, 0),
    ],
)
def test_it_is_taken_where_it_serves_and_elsewhere_xla_is(device, dtype, kernels, monkeypatch):
    triton_interpreter.traced(monkeypatch, TRITON)
    loss = lambda arrays: (attend(**arrays).astype(jnp.float32) ** 2).sum()
    with targeting(device):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(arguments(dtype))
    assert str(jaxpr).count("pure_callback[") == kernels


@pytest.mark.skipif(static_kernels_triton.missing() is not None,
                    reason=f"cannot compile: {static_kernels_triton.missing()}")
@pytest.mark.slow
@pytest.mark.parametrize("case", static_kernels_triton.CASES)
@pytest.mark.parametrize("capability", static_kernels_triton.CAPABILITIES)
def test_kernels_compile_with_hardly_a_spill(case, capability):
    kernels = static_kernels_triton.run(case, capability)
    assert {f"linear_attention_{name}" for name in
            ("states", "dstates", "o", "dq", "dk", "dv")} <= kernels.keys()
    for name, figures in kernels.items():
        assert figures["spilled_bytes"] <= 32, (name, figures)  # two of them spill 8 and 24
        assert figures["shared_bytes"] <= 101376, (name, figures)  # of a block on sm_89
        assert figures["mma"], (name, figures)
