"""The gated delta rule's TPU kernels, interpreted with detection of races: numbers only."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule import gated_delta_rule, tpu, tpu_triangular
from pallas_kernels.gated_delta_rule.tpu_triangular import block_inverses, lockstep, merge


@pytest.fixture(autouse=True)
def on_tpu(monkeypatch):
    monkeypatch.setattr(tpu, "target_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(
            pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield


# Of these, one by default: packed rows, several chunks and steps.
DEFAULT = next(
    i for i, case in enumerate(cases.PAIRWISE)
    if case.T == 150 and case.rows == "packed" and case.dtype == "float32"
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i == DEFAULT else pytest.mark.slow)
     for i, case in enumerate(cases.PAIRWISE)],
)
def test_tpu_is_the_oracle(case):
    cases.assert_close(cases.run(case, "tpu", chunk_size=32), cases.oracle(case), case.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.PAIRWISE, ids=str)
def test_tpu_is_the_oracle_with_its_own_chunks(case):
    cases.assert_close(cases.run(case, "tpu"), cases.oracle(case), case.dtype)


@pytest.mark.parametrize(
    "heads", [(12, 2, 6), pytest.param((1, 1, 4), marks=pytest.mark.slow)], ids=str)
def test_heads_that_share_others_across_grid_steps(heads, rng):
    (Hq, Hk, H), T, K = heads, 20, 16
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    arrays = normal(1, T, Hq, K), normal(1, T, Hk, K) / 8, normal(1, T, H, K)
    beta, decay = rng.uniform(0, 1, (1, T, H)), -np.abs(normal(1, T, H))
    call = lambda name: gated_delta_rule(*arrays, beta.astype(np.float32), decay, chunk_size=16,
                                         implementation=name)[0]
    np.testing.assert_allclose(call("tpu"), call("reference"), atol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_repeat_cost_no_precision(beta, rng):
    """All keys of a chunk are one: the powers of the system's matrix are largest."""
    T = 128
    a = np.tril(np.full((T, T), beta, np.float32), -1)

    def kernel(a_ref, inverse_ref, scratch):
        diagonal, lower = (scratch[name].at[0, 0] for name in ("diagonal", "lower"))
        lockstep([block_inverses(lambda rows: a_ref[rows], diagonal, lower)])
        lockstep([merge(diagonal, lower, inverse_ref)])

    inverse = pl.pallas_call(kernel, jax.ShapeDtypeStruct((T, T), jnp.float32),
                             scratch_shapes=[tpu_triangular.scratch(1, 1, T, exact=True)])
    expected = np.linalg.inv(np.eye(T) + a.astype(np.float64))
    np.testing.assert_allclose(jax.jit(inverse)(a), expected, atol=1e-6 if beta == 1 else 1e-4)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(platform="cpu"), "serves TPU only, the target is cpu"),
        (dict(dtype=jnp.float16), "needs v in bfloat16 or float32, got float16"),
        (dict(chunk_size=48), "needs chunk_size 16, 32, 64 or 128, got 48"),
        (dict(traced_scale=True), "a scale known at compile time"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_what_is_refused(options, reason, monkeypatch):
    options = dict(options)
    monkeypatch.setattr(tpu, "target_platform", lambda: options.get("platform", "tpu"))
    q = jnp.ones((1, 32, 2, 64), options.get("dtype", jnp.bfloat16))

    def call(scale):
        return gated_delta_rule(q, q, q, q[..., 0], scale=scale, implementation="tpu",
                                chunk_size=options.get("chunk_size"))

    with pytest.raises(NotImplementedError, match=reason):
        jax.jit(call)(1.0) if "traced_scale" in options else call(1.0)
