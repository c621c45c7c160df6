"""The decoder against logits that published code computed; `make_golden.py` wrote the files."""

import pathlib

import jax
import jax.numpy as jnp
import mamba2
import numpy as np
import pytest
from make_golden import HYPENET, LOGIT_BASE, QWEN3
from named_weights import decoder_with
from qwen3_next import Sizes, mixer_with

from hybridjax.mixers.base import Context
from hybridjax.mixers.mamba2 import Mamba2
from hybridjax.models.decoder import Decoder
from pallas_kernels.gated_delta_rule import gated_delta_rule

HERE = pathlib.Path(__file__).parent

CASES = {
    "qwen3": ("qwen3", QWEN3, "logits", None),
    "hypenet": ("hypenet", HYPENET, "logits", None),
    "hypenet-log-scaled": ("hypenet", HYPENET, "logits_scaled", LOGIT_BASE),
}


@pytest.mark.parametrize("name, sizes, logits, logit_base", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_published_code(name, sizes, logits, logit_base):
    with np.load(HERE / f"{name}.npz") as file:
        golden = dict(file)
    weights = {key: x for key, x in golden.items() if key.endswith(".weight")}
    base = None if logit_base is None else jnp.asarray(float(logit_base))
    ctx = Context.of_rows(golden["tokens"], logit_base=base)
    actual = jax.jit(Decoder.__call__)(decoder_with(sizes.model(), weights), golden["tokens"], ctx)
    np.testing.assert_allclose(actual, golden[logits], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def qwen3_next():
    with np.load(HERE / "qwen3_next.npz") as file:
        return dict(file)


def part(golden, prefix):
    return {name.removeprefix(prefix): x for name, x in golden.items() if name.startswith(prefix)}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_the_rule_is_that_of_published_code(form, implementation, qwen3_next):
    arrays = {name: x for name, x in part(qwen3_next, "rule ").items() if " " not in name}
    rule = jax.jit(lambda arrays: gated_delta_rule(
        **arrays, l2_norm=True, output_final_state=True, implementation=implementation))
    for name, x in zip(("o", "state"), rule(arrays)):
        np.testing.assert_allclose(x, qwen3_next[f"rule {form} {name}"], atol=1e-5, rtol=1e-5)


def test_the_layer_is_that_of_published_code(qwen3_next):
    x, mixer = qwen3_next["x"], mixer_with(Sizes(), part(qwen3_next, "layer "))
    y = jax.jit(type(mixer).__call__)(mixer, x, Context.of_rows(x[..., 0]))
    np.testing.assert_allclose(y, qwen3_next["y"], atol=1e-4, rtol=1e-4)


def test_mamba2_is_that_of_published_code():
    with np.load(HERE / "mamba2.npz") as file:
        golden = dict(file)
    x, y = golden.pop("x"), golden.pop("y")
    actual = jax.jit(Mamba2.__call__)(
        mamba2.mixer_with(mamba2.Sizes(), golden), x, Context.of_rows(x[..., 0])
    )
    np.testing.assert_allclose(actual, y, atol=1e-4, rtol=1e-4)
