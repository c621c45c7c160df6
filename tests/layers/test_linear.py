"""Linear maps whose kernels are cut over `fsdp`, on simulated devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax.config import MeshConfig
from hybridjax.layers.linear import Linear
from hybridjax.sharding import make_mesh, place, place_parameters

MESHES = {
    "fsdp": MeshConfig(data=1, fsdp=8),
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp, context": MeshConfig(data=1, fsdp=4, context=2),
}
AXES = {"from the stream": ("embed", "mlp"), "to the stream": ("mlp", "embed")}


def gradient(axes, x, call):
    linear = place_parameters(Linear((16, 32), axes, jax.random.key(0), bias=True))
    x = place(x, "batch", "length", None if axes[0] == "embed" else axes[0])
    loss = lambda linear, x: jnp.sum(jnp.sin(linear(x)))
    return call(jax.jit(jax.grad(loss, argnums=(0, 1))), linear, x)


def run(f, *args):
    return f(*args)


def program(f, *args):
    return f.lower(*args).compile().as_text()


@pytest.mark.parametrize("rows", (8, 3), ids=("rows cut", "rows whole"))
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_gradients_are_those_of_one_device(rng, axes, mesh, rows):
    x = jnp.asarray(rng.normal(size=(rows, 4, 16)), jnp.float32)
    expected = gradient(axes, x, run)
    with jax.set_mesh(make_mesh(mesh)):
        found = gradient(axes, x, run)
    assert found[0].kernel[...].sharding.spec.count("fsdp") == 1
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_no_device_gets_the_sum_of_the_whole_gradient(axes):
    with jax.set_mesh(make_mesh(MESHES["data, fsdp, tensor"])):
        text = gradient(axes, jnp.ones((8, 4, 16)), program)
    parts = re.findall(r"f32\[([\d,]+)\][^=]*(?:\) |} )(all-reduce|reduce-scatter)\(", text)
    whole, part = "16,16", "8,16"  # of one device's columns, or rows, over `tensor`
    assert (part, "reduce-scatter") in parts and (part, "all-reduce") in parts
    assert whole not in {shape for shape, _ in parts}
