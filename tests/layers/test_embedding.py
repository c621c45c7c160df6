"""The lookup of tokens: from a gathered table, or where the rows lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax.config import MeshConfig
from hybridjax.layers.embedding import Embedding
from hybridjax.sharding import make_mesh, place, place_parameters

MESHES = {
    "tensor": MeshConfig(data=2, tensor=4),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "all": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}
TOKENS = {"few": (8, 2), "many": (8, 16), "one row": (1, 1)}


def embedding():
    return Embedding(64, 16, jax.random.key(0), std=1.0)


def loss(embedding, tokens):
    h = embedding(tokens, jnp.float32)
    return jnp.sum(jnp.sin(h)), h


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("shape", TOKENS.values(), ids=TOKENS)
def test_rows_and_gradients_are_those_of_one_device(rng, shape, mesh):
    tokens = rng.integers(64, size=shape)
    grad = jax.jit(jax.grad(loss, has_aux=True))
    expected, h = grad(embedding(), jnp.asarray(tokens))
    np.testing.assert_array_equal(h, embedding().table[...][tokens])
    with jax.set_mesh(make_mesh(mesh)):
        placed = place_parameters(embedding())
        found = grad(placed, place(jnp.asarray(tokens), "batch", "length"))
        assert found[0].table[...].sharding == placed.table[...].sharding
    np.testing.assert_array_equal(found[1], h)
    np.testing.assert_allclose(found[0].table[...], expected.table[...], rtol=1e-6, atol=1e-6)


def test_one_token_does_not_gather_the_table():
    with jax.set_mesh(make_mesh(MESHES["all"])):
        args = place_parameters(embedding()), jnp.zeros((1, 1), jnp.int32)
        text = jax.jit(lambda e, t: e(t, jnp.float32)).lower(*args).compile().as_text()
    sizes = {int(np.prod([int(n) for n in shape.split(",")]))
             for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert max(sizes) == 64 * 16 // 4  # a device's part
