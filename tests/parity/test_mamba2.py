"""The Mamba-2 mixer against that of `transformers`, in f32 on the CPU."""

import jax
import numpy as np
import pytest
from mamba2 import Sizes, layer_with, mixer_with, random_weights

from hybridjax.mixers.base import Context

torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("transformers", reason="needs the parity extra: transformers")

pytestmark = pytest.mark.parity

SIZES = {
    "grouped": Sizes(),
    "one group": Sizes(heads=6, head_dim=8, state_dim=16, groups=1),
    "short convolution": Sizes(heads=2, groups=2, convolution=2),
}


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def pair(request, rng):
    """Sizes, their layer, ours with its weights, and inputs."""
    sizes = request.param
    weights = random_weights(sizes, rng)
    x = rng.normal(size=(2, 75, sizes.width)).astype(np.float32)
    return sizes, layer_with(sizes, weights), mixer_with(sizes, weights), x


def test_layer(pair):
    _, theirs, ours, x = pair
    y = jax.jit(type(ours).__call__)(ours, x, Context.of_rows(x[..., 0]))
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_the_layer(pair):
    """By the inputs, and by every weight: mapped from theirs as the weights themselves are."""
    sizes, theirs, ours, x = pair

    @jax.jit
    def gradient(mixer, x):
        loss = lambda mixer, x: (mixer(x, Context.of_rows(x[..., 0])) ** 2).sum()
        return jax.grad(loss, argnums=(0, 1))(mixer, x)

    actual, actual_x = gradient(ours, x)
    their_x = torch.tensor(x, requires_grad=True)
    (theirs(their_x) ** 2).sum().backward()
    grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)
    close(actual_x, their_x.grad)
    jax.tree.map(close, actual, mixer_with(sizes, grads))
