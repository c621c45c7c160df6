"""Every implementation against the oracle, outputs and gradients, on one table of cases."""

import pytest
from jax.experimental.pallas import tpu as pltpu
from linear_attention_cases import FACTORS, TABLE, assert_is_the_oracle, pairwise

from pallas_kernels.linear_attention import tpu


def first(count):
    return [pytest.param(case, marks=() if i < count else pytest.mark.slow)
            for i, case in enumerate(TABLE)]


@pytest.mark.parametrize("case", first(20))
def test_xla(case):
    assert_is_the_oracle(case, "xla")


@pytest.mark.parametrize("case", first(8))
def test_tpu_interpreted(case, monkeypatch):
    monkeypatch.setattr(tpu, "target_platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "_matrix_unit", lambda: 128)
    with pltpu.force_tpu_interpret_mode(
            pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        assert_is_the_oracle(case, "tpu")


def test_the_table_holds_every_pair():
    pairs = {(a, x[a], b, x[b]) for x in TABLE.values() for a in x for b in x if a < b}
    assert len(pairs) == sum(
        len(FACTORS[a]) * len(FACTORS[b]) for a in FACTORS for b in FACTORS if a < b)
    assert len(TABLE) == 150 and pairwise(FACTORS, 3) == list(TABLE.values())[:3]
