"""The decoder configured as Qwen3 against the one in `transformers`, in f32 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import qwen3_with
from named_weights import Sizes, decoder_with, random_weights, weights_of

from hybridjax.loss import next_token_loss
from hybridjax.models.decoder import Decoder

torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("transformers", reason="needs the parity extra: transformers")

pytestmark = pytest.mark.parity

SIZES = {
    "grouped-wide-heads": Sizes("QQQ"),
    "untied-narrow-heads": Sizes("QQ", width=64, head_dim=8, tied=False),
    "ungrouped-high-theta": Sizes("QQ", heads=2, kv_heads=2, theta=1e6),
    "one-kv-head": Sizes("QQ", heads=6, kv_heads=1, head_dim=8, tied=False),
}
BATCH, LENGTH = 2, 75


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def pair(request, rng):
    """Their model, ours with its weights, tokens, and our config."""
    sizes = request.param
    weights = random_weights(sizes.model(), rng)
    tokens = rng.integers(0, sizes.vocab, (BATCH, LENGTH))
    return qwen3_with(sizes, weights), decoder_with(sizes.model(), weights), tokens, sizes.model()


def test_logits(pair):
    theirs, ours, tokens, _ = pair
    logits = jax.jit(Decoder.__call__)(ours, tokens)
    np.testing.assert_allclose(logits, their_logits(theirs, tokens), atol=1e-4, rtol=1e-4)


def test_extended_in_pieces(pair):
    theirs, ours, tokens, _ = pair
    state, pieces = ours.init_state(BATCH, LENGTH + 5), []
    extend = jax.jit(Decoder.extend)
    for piece in np.split(tokens, [40, 73, 74], axis=1):
        h, state = extend(ours, piece, state)
        pieces.append(ours.logits(h))
    logits = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(logits, their_logits(theirs, tokens), atol=1e-4, rtol=1e-4)


def test_gradients_of_the_loss(pair):
    theirs, ours, tokens, config = pair
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    @jax.jit
    @jax.value_and_grad
    def mean_loss(model):
        weights = jnp.full(targets.shape, 1 / targets.size)
        return next_token_loss(model, model.hidden(inputs), targets, weights)[0]

    loss, gradient = mean_loss(ours)
    their_loss = torch.nn.functional.cross_entropy(
        theirs(torch.tensor(inputs)).logits.flatten(0, 1), torch.tensor(targets).flatten()
    )
    their_loss.backward()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, actual in weights_of(config, gradient).items():
        np.testing.assert_allclose(actual, expected[name], atol=1e-6, rtol=1e-3, err_msg=name)


@torch.no_grad()
def their_logits(model, tokens):
    return model(torch.tensor(tokens)).logits.numpy()
