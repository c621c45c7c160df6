"""The Mamba-2 mixer against that of `transformers`, in f32 on the CPU."""

import functools

import numpy as np
import pytest
from mamba2 import Sizes, layer_with, mixer_with, random_weights
from same_layer import check_gradients, check_outputs

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
    check_outputs(theirs, ours, x)


def test_gradients_of_the_layer(pair):
    sizes, theirs, ours, x = pair
    check_gradients(theirs, ours, x, functools.partial(mixer_with, sizes), atol=1e-3)
