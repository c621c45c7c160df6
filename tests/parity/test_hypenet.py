"""Whole HypeNet decoders against a NumPy float64 oracle of the paper's equations."""

import hypenet_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from named_weights import Sizes, decoder_with, random_weights

from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder

SIZES = {
    "LALL": Sizes("LALL"),
    "scanned-untied": Sizes("LALALA", heads=2, kv_heads=1, theta=1e6, tied=False),
    "six-heads": Sizes("LA", width=40, heads=6, head_dim=8),
}


@pytest.mark.parametrize("logit_base", [None, 20.0], ids=["plain", "log-scaled"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_logits_are_the_papers(sizes, logit_base, rng):
    weights = random_weights(sizes.model(), rng)
    tokens = rng.integers(0, sizes.vocab, (2, 83))
    base = None if logit_base is None else jnp.asarray(logit_base)
    ctx = Context.of_rows(tokens, logit_base=base)
    logits = jax.jit(Decoder.__call__)(decoder_with(sizes.model(), weights), tokens, ctx)
    expected = [hypenet_oracle.logits(weights, sizes, row, logit_base) for row in tokens]
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
