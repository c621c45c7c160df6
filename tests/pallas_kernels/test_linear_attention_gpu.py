"""The Hopper kernels without a GPU: numbers and races in interpret mode, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import targeting

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import hopper_interpreter  # noqa: E402

from pallas_kernels.linear_attention import gpu, linear_attention  # noqa: E402
from pallas_kernels.linear_attention.decay import alibi_slopes  # noqa: E402

interprets = pytest.mark.skipif(
    not hopper_interpreter.interprets(),
    reason=f"jax {jax.__version__} has no interpret mode for Mosaic GPU")

LIMITS = {"o": 0.005, "state": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008,
          "dinitial_state": 0.008, "ddecay": 0.02}


def documents(*runs):
    """Segments of one row from (document, length) pairs."""
    return np.concatenate([np.full(length, document, np.int32) for document, length in runs])


# Documents inside a chunk, across chunks, of one token; gaps between and inside them.
PACKED = documents((7, 20), (0, 5), (7, 3), (2, 1), (3, 80), (0, 6), (9, 55), (0, 30))

CASES = {
    "heads": dict(T=128, decay="heads"),
    "heads-wide": dict(T=128, decay="heads", K=128, V=128),
    "token": dict(T=128, decay="token"),
    "token-wide-ragged": dict(T=150, decay="token", K=128, V=128),
    "splits": dict(T=256, decay="token", splits=2),
    "splits-uneven": dict(T=300, decay="heads", splits=3),
    "packed": dict(T=200, decay="token", packed=True),
    "packed-splits": dict(T=200, decay="token", packed=True, splits=2),
    "packed-heads": dict(T=200, decay="heads", packed=True),
    "strong": dict(T=100, decay="strong"),
    "none": dict(T=100, decay="none"),
    "one-token": dict(T=1, decay="token"),
    "narrow-values": dict(T=100, decay="token", K=128, V=64),
    "narrow-keys": dict(T=100, decay="heads", K=40, V=96),
    "two-rows": dict(T=70, decay="token", B=2, H=2),
}
DEFAULT = ("heads", "one-token", "packed-splits", "strong")


def make(rng, T, decay, B=1, H=1, K=64, V=64, packed=False, splits=None):
    normal = lambda *shape: rng.standard_normal(shape)
    decay = {
        "heads": lambda: -alibi_slopes(H) * 8,
        "none": lambda: np.zeros(H),
        "token": lambda: -0.1 * np.abs(normal(B, T, H)),
        "strong": lambda: -60 * np.abs(normal(B, T, H)),
    }[decay]()
    rounded = lambda *shape: np.asarray(jnp.asarray(normal(*shape), jnp.bfloat16), np.float64)
    arrays = dict(q=rounded(B, T, H, K), k=rounded(B, T, H, K), v=rounded(B, T, H, V),
                  initial_state=normal(B, H, K, V), decay=decay)
    cotangents = rounded(B, T, H, V), normal(B, H, K, V)
    return arrays, cotangents, np.stack([PACKED[:T]] * B) if packed else None


def run(arrays, cotangents, segments, implementation, narrow, wide):
    """Outputs and gradients; q, k, v, o in the narrow type, the rest in the wide one."""
    kinds = {name: narrow if name in "qkv" else wide for name in arrays}
    arrays = {name: jnp.asarray(x, kinds[name]) for name, x in arrays.items()}
    constant = {"decay": arrays.pop("decay")} if arrays["decay"].ndim == 1 else {}

    @jax.jit
    def value_and_grad(arrays, cotangents):
        out, vjp = jax.vjp(lambda x: linear_attention(
            **x, **constant, segments=segments, output_final_state=True,
            implementation=implementation), arrays)
        return *out, *vjp(cotangents)

    cotangents = tuple(jnp.asarray(x, kind) for x, kind in zip(cotangents, (narrow, wide)))
    o, state, gradients = value_and_grad(arrays, cotangents)
    return {"o": o, "state": state} | {f"d{name}": x for name, x in gradients.items()}


def distances(got, expected):
    """Root mean square of each difference relative to the expected, or to 1e-3 of the largest
    gradient where that is more."""
    rms = lambda x: np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))
    floor = 1e-3 * max(rms(x) for name, x in expected.items() if name.startswith("d"))
    assert got.keys() == expected.keys()
    return {name: rms(np.asarray(got[name], np.float64) - np.asarray(expected[name]))
            / max(rms(expected[name]), floor) for name in expected}


def check(rng, case):
    arrays, cotangents, segments = make(rng, **CASES[case])
    with jax.enable_x64(True):
        expected = run(arrays, cotangents, segments, "reference", jnp.float64, jnp.float64)
    got = run(arrays, cotangents, segments, "gpu", jnp.bfloat16, jnp.float32)
    errors = distances(got, expected)
    assert all(errors[name] < LIMITS[name] for name in errors), errors
    return errors


@interprets
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in DEFAULT else pytest.mark.slow)
             for case in CASES])
def test_gpu_is_the_reference_in_interpret_mode(case, rng, monkeypatch):
    if splits := CASES[case].get("splits"):
        monkeypatch.setattr(gpu, "_splits", lambda blocks, N: splits)
    with hopper_interpreter.interpreted(monkeypatch):
        check(rng, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_is_the_reference_on_a_gpu(case, rng, monkeypatch):
    if splits := CASES[case].get("splits"):
        monkeypatch.setattr(gpu, "_splits", lambda blocks, N: splits)
    check(rng, case)


def arguments(dtype=jnp.bfloat16, K=64, V=64):
    x = jax.ShapeDtypeStruct((1, 10, 2, K), dtype)
    return dict(q=x, k=x, v=jax.ShapeDtypeStruct((1, 10, 2, V), dtype))


def attend(q, k, v, chunk_size=None, implementation=None):
    return linear_attention(
        q, k, v, -np.ones(2), chunk_size=chunk_size, implementation=implementation)[0]


@pytest.mark.parametrize(
    "device, arrays, options, reason",
    [
        (None, dict(), dict(), "serves GPU only, the target is cpu"),
        ("NVIDIA A100-SXM4-80GB", dict(), dict(), "the target is NVIDIA A100-SXM4-80GB"),
        ("NVIDIA L4", dict(), dict(), "the target is NVIDIA L4"),
        ("NVIDIA B200", dict(), dict(), "Hopper only .* the target is NVIDIA B200"),
        ("NVIDIA H100 80GB HBM3", dict(dtype=jnp.float32), dict(), "needs bfloat16 .* got float32"),
        ("NVIDIA H200", dict(K=192), dict(), "needs K and V up to 128 .* got 192 and 64"),
        ("NVIDIA GH200 480GB", dict(), dict(chunk_size=32), "by chunks of 64, got chunk_size 32"),
    ],
)
def test_what_the_gpu_cannot_serve_is_refused_with_the_reason(device, arrays, options, reason):
    arrays = arguments(**arrays)
    with targeting(device):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(functools.partial(attend, **options, implementation="gpu"), **arrays)


@pytest.mark.parametrize("device, kernels", [("NVIDIA H200", 4), ("NVIDIA A100-SXM4-80GB", 0)])
def test_on_hopper_it_is_taken_and_lowers_elsewhere_xla_is(device, kernels):
    def loss(arrays):
        return (attend(**arrays).astype(jnp.float32) ** 2).sum()

    with targeting(device):
        lowered = jax.jit(jax.grad(loss)).trace(arguments()).lower(lowering_platforms=("cuda",))
    assert len(re.findall("custom_call @mosaic_gpu", lowered.as_text())) == kernels
