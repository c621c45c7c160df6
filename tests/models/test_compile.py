"""What is compiled grows with the pattern of a stack, not with its depth."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from hybridjax.config import ModelConfig, typed
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder


def decoder(layers, scan=True):
    blocks = {
        letter: block(mixer("toys:Mean"), mlp=mlp("swiglu", hidden=8 * n))
        for n, letter in enumerate("LA", start=1)
    }
    config = dict(layers=layers, blocks=blocks, width=8, vocab=16, scan=scan)
    config = typed(ConfigDict(config), ModelConfig)
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))


def forward(model, tokens):
    return model(tokens)


def extend(model, tokens, state):
    return model.extend(tokens, state)


TABLE = {
    "8 layers": ("LLLA" * 2, True, 4),
    "36 layers": ("LLLA" * 9, True, 4),
    "unrolled": ("LLLA" * 2, False, 8),
    "9b": ("LAALALAALLALLLLLLLLLLLLLALLLLLLLLAAL", True, 12),
}


@pytest.mark.parametrize("layers, scan, expected", TABLE.values(), ids=TABLE.keys())
def test_bodies(layers, scan, expected):
    model, tokens = decoder(layers, scan), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    assert bodies(forward, model, tokens) == expected
    state = jax.eval_shape(lambda m: m.init_state(1, 8), model)
    assert bodies(extend, model, tokens, state) == len(layers)  # unrolled: caches stay in place


def bodies(f, *args):
    """Blocks in the traced program: each has one MLP, whose gate is the only logistic."""

    def count(jaxpr):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        inner = [
            value
            for equation in jaxpr.eqns
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
            if hasattr(value, "eqns")
        ]
        own = sum(equation.primitive.name == "logistic" for equation in jaxpr.eqns)
        return own + sum(map(count, inner))

    return count(jax.make_jaxpr(f)(*args).jaxpr)
