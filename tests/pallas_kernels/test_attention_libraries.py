"""The kernels of libraries: what they refuse, and splash attention without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu
from targets import targeting

from pallas_kernels.attention import attention, cudnn, splash

SEGMENTS = np.repeat([[1, 2, 3, 0]], [50, 100, 60, 46], axis=1).astype(np.int32)
INDEX = np.arange(256)[None]

SERVED = {
    "causal": dict(),
    "narrow": dict(K=32, V=64),
    "window": dict(window=37),
    "packed": dict(window=37, q_segments=SEGMENTS, k_segments=SEGMENTS),
}


def make(rng, K=128, V=128, **options):
    shapes = (1, 256, 4, K), (1, 256, 2, K), (1, 256, 2, V)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes], options


def gradients(implementation, options):
    return jax.grad(
        lambda *x: (attention(*x, **options, implementation=implementation) ** 2).sum(), (0, 1, 2))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "packed" else pytest.mark.slow)
     for case in SERVED],
)
def test_splash_is_the_reference_in_interpret_mode(case, rng, monkeypatch):
    arrays, options = make(rng, **SERVED[case])
    monkeypatch.setattr(splash, "target_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(gradients("splash", options))(*arrays)
    expected = jax.jit(gradients("reference", options))(*arrays)
    for x, y in zip(got, expected):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())


def test_on_tpu_splash_is_taken_and_lowers(rng):
    arrays, options = make(rng, **SERVED["packed"])
    arrays = [x.astype(jnp.bfloat16) for x in arrays]
    with targeting("TPU v6 lite", "tpu", num_cores=1):
        exported = export.export(jax.jit(gradients(None, options)), platforms=["tpu"])(*arrays)
    assert exported.mlir_module().count("tpu_custom_call") >= 3  # forward, dq, dk and dv


@pytest.mark.parametrize(
    "module, options, reason",
    [
        (splash, dict(), "serves TPU only, the target is cpu"),
        (splash, dict(q_index=INDEX, k_index=INDEX), "row order only"),
        (splash, dict(T=200), "a multiple of 128, got T 200"),
        (splash, dict(window=jnp.asarray(3)), None),
        (cudnn, dict(), "serves GPU only, the target is cpu"),
        (cudnn, dict(q_segments=SEGMENTS, k_segments=SEGMENTS), "takes no segments"),
        (cudnn, dict(q_index=INDEX, k_index=INDEX), "row order only"),
        (cudnn, dict(dtype=jnp.float32), "needs bfloat16 or float16, got float32"),
        (cudnn, dict(K=60), "multiple of 8 up to 128, got 60 and 128"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(module, options, reason, monkeypatch):
    name = module.__name__.rpartition(".")[2]
    if "target is cpu" not in (reason or ""):
        monkeypatch.setattr(
            module, "target_platform", lambda: {"splash": "tpu", "cudnn": "gpu"}[name])
    options = dict(options)
    T, K = options.pop("T", 256), options.pop("K", 128)
    dtype = options.pop("dtype", jnp.bfloat16)
    q, k, v = (jnp.ones((1, T, 2, width), dtype) for width in (K, K, 128))
    call = lambda **options: attention(q, k, v, **options, implementation=name)
    if reason is None:
        call, reason = jax.jit(call), "a window known at compile time"
    with pytest.raises(NotImplementedError, match=reason):
        call(**options)
