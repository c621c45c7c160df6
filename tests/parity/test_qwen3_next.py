"""The gated delta rule and its mixer against those in `transformers`, in f32 on the CPU."""

import functools

import jax
import numpy as np
import pytest
from qwen3_next import Sizes, layer_with, mixer_with, random_weights, rule_arrays, their_rule
from same_layer import check_gradients, check_outputs

from hybridjax.mixers.base import Context
from pallas_kernels.gated_delta_rule import gated_delta_rule

torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("transformers", reason="needs the parity extra: transformers")

pytestmark = pytest.mark.parity


def tensors(arrays):
    return {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("T", [1, 7, 150])
def test_rule(form, T, rng):
    arrays = rule_arrays(rng, T)
    weights = rng.normal(size=arrays["v"].shape).astype(np.float32)

    @jax.jit
    def ours(arrays):
        def loss(arrays):
            o, state = gated_delta_rule(**arrays, l2_norm=True, output_final_state=True)
            return (o * weights).sum() + (state**2).sum(), (o, state)

        return jax.grad(loss, has_aux=True)(arrays)

    gradient, out = ours(arrays)
    theirs = tensors(arrays)
    their_o, their_state = their_rule(form, **theirs)
    for x, y in zip(out, (their_o, their_state)):
        np.testing.assert_allclose(x, y.detach().numpy(), atol=1e-5, rtol=1e-5)
    if form == "chunk":  # the recurrent form writes in place
        ((their_o * torch.tensor(weights)).sum() + (their_state**2).sum()).backward()
        for name, x in theirs.items():
            np.testing.assert_allclose(gradient[name], x.grad, atol=2e-4, rtol=1e-4, err_msg=name)


SIZES = {
    "grouped": Sizes(),
    "ungrouped": Sizes(heads=3, value_heads=3, head_dim=8, value_dim=12),
    "short-convolution": Sizes(heads=1, value_heads=4, convolution=2),
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
    check_gradients(theirs, ours, x, functools.partial(mixer_with, sizes), atol=1e-4)


def test_extended_in_pieces(pair):
    _, theirs, ours, x = pair
    state, pieces = ours.init_state(2, 80, x.dtype), []
    extend = jax.jit(type(ours).extend)
    for piece in np.split(x, [40, 73, 74], axis=1):
        y, state = extend(ours, piece, state, Context.of_rows(piece[..., 0]))
        pieces.append(y)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=1e-4, rtol=1e-4)
