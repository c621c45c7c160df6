"""Every implementation against the oracle, outputs and gradients, on one table of cases."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from linear_attention_cases import ALL, FACTORS, TABLE, assert_is_the_oracle, pairwise

from pallas_kernels.linear_attention import linear_attention, tpu, xla


@pytest.fixture(autouse=True)
def few_programs(request):
    """Of all cases they are more than a process can map."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


def first(count):
    return [pytest.param(case, marks=() if i < count else pytest.mark.slow)
            for i, case in enumerate(TABLE)]


@pytest.mark.parametrize("case", first(6))
def test_xla(case, monkeypatch):
    monkeypatch.setattr(xla, "_SPAN", 2)  # three spans of the longest rows
    assert_is_the_oracle(case, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted({"-".join(x.split("-")[:4]) for x in ALL}))
def test_every_case(shape, monkeypatch):
    monkeypatch.setattr(xla, "_SPAN", 2)
    for case in ALL:
        if case.startswith(f"{shape}-"):
            for implementation in ("xla", "reference"):
                assert_is_the_oracle(case, implementation)


@pytest.mark.parametrize("case", first(1))
def test_tpu_interpreted(case, monkeypatch):
    monkeypatch.setattr(tpu, "target_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(
            pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        assert_is_the_oracle(case, "tpu")


def test_the_table_holds_every_pair():
    pairs = {(a, x[a], b, x[b]) for x in TABLE.values() for a in x for b in x if a < b}
    assert len(pairs) == sum(
        len(FACTORS[a]) * len(FACTORS[b]) for a in FACTORS for b in FACTORS if a < b)
    assert len(TABLE) == 150 and pairwise(FACTORS, 3) == list(TABLE.values())[:3]


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(platform="cpu"), "serves TPU only, the target is cpu"),
        (dict(v_dtype=jnp.float32), "all bfloat16 or all float32, got bfloat16, bfloat16, float32"),
        (dict(chunk_size=24), "a multiple of 16 up to 256, got 24"),
        (dict(chunk_size=512), "a multiple of 16 up to 256, got 512"),
        (dict(traced_scale=True), "a scale known at compile time"),
    ],
)
def test_what_the_tpu_kernels_refuse(options, reason, monkeypatch):
    options = dict(options)
    monkeypatch.setattr(tpu, "target_platform", lambda: options.get("platform", "tpu"))
    q = jnp.ones((1, 32, 2, 64), jnp.bfloat16)

    def call(scale):
        return linear_attention(
            q, q, q.astype(options.get("v_dtype", q.dtype)), -jnp.ones(2), scale=scale,
            chunk_size=options.get("chunk_size"), implementation="tpu")

    with pytest.raises(NotImplementedError, match=reason):
        jax.jit(call)(1.0) if "traced_scale" in options else call(1.0)
