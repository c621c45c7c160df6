"""The decoder against logits that published code computed; `make_golden.py` wrote the files."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import HYPENET, LOGIT_BASE, QWEN3
from named_weights import decoder_with

from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder

CASES = {
    "qwen3": ("qwen3", QWEN3, "logits", None),
    "hypenet": ("hypenet", HYPENET, "logits", None),
    "hypenet-log-scaled": ("hypenet", HYPENET, "logits_scaled", LOGIT_BASE),
}


@pytest.mark.parametrize("name, sizes, logits, logit_base", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_published_code(name, sizes, logits, logit_base):
    with np.load(pathlib.Path(__file__).parent / f"{name}.npz") as file:
        golden = dict(file)
    weights = {key: x for key, x in golden.items() if key.endswith(".weight")}
    base = None if logit_base is None else jnp.asarray(float(logit_base))
    ctx = Context.of_rows(golden["tokens"], logit_base=base)
    actual = jax.jit(Decoder.__call__)(decoder_with(sizes.model(), weights), golden["tokens"], ctx)
    np.testing.assert_allclose(actual, golden[logits], atol=1e-4, rtol=1e-4)
