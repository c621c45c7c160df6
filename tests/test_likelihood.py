"""Log-likelihoods of packed requests, and completions, on small models."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybridjax.config import MeshConfig, ModelConfig, typed
from hybridjax.data.tokenizer import ByteTokenizer
from hybridjax.evals.batches import traced
from hybridjax.evals.completion import Answer, complete
from hybridjax.evals.likelihood import log_likelihoods, packed
from hybridjax.mixers.base import Context
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters

VOCAB, HEADS = 256, dict(heads=2, head_dim=8)


def small_model() -> Decoder:
    """Layers that would see other requests of a row by a state and by a softmax."""
    ffn = mlp("swiglu", hidden=16)
    legend = {
        "L": block(mixer("lightning", **HEADS), mlp=ffn),
        "A": block(mixer("attention", **HEADS), mlp=ffn),
    }
    config = dict(layers="LA", blocks=legend, width=16, vocab=VOCAB, embedding_std=1.0)
    config = typed(ConfigDict(config), ModelConfig)
    return jax.jit(lambda: Decoder(config, jax.random.key(3)))()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def requests(rng):
    """Prefixes and continuations: short ones, one longer than a row, an empty continuation."""
    sizes = [(5, 3), (1, 7), (20, 1), (60, 20), (9, 0), (1, 1), (12, 12), (30, 2)]
    ids = lambda n: rng.integers(1, VOCAB, size=n).tolist()
    return [(ids(n), ids(m)) for n, m in sizes]


@jax.jit
def forward(model, tokens, base):
    return model(tokens, Context.of_rows(tokens, logit_base=base))


def logits_of(model, ids, base=None):
    """Of one row, by the parallel form; padded to one shape."""
    tokens = np.zeros((1, 96), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(forward(model, tokens, traced(base))[0], np.float64)


def alone(model, request, base=None):
    """Log-likelihood of a request in a row of its own, and whether it is what is likeliest."""
    prefix, continuation = request
    z = logits_of(model, prefix + continuation, base)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    places = range(len(prefix) - 1, len(prefix) + len(continuation) - 1)
    total = sum(logp[t, token] for t, token in zip(places, continuation))
    return total, all(z[t].argmax() == token for t, token in zip(places, continuation))


@pytest.mark.parametrize("base", (None, 8.0))
def test_packed_requests_score_as_each_alone(model, requests, base):
    prefix = requests[0][0]
    likely = [int(logits_of(model, prefix, base)[len(prefix) - 1].argmax())]
    requests = [*requests, (prefix, likely)]
    scored = log_likelihoods(model, requests, base, row=32)
    expected = [alone(model, request, base) for request in requests]
    np.testing.assert_allclose([x for x, _ in scored], [x for x, _ in expected], atol=2e-5)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    assert scored[4] == (0.0, True) and scored[-1][1] and not scored[0][1]


@pytest.mark.slow
def test_devices_share_the_rows(model, requests):
    one = log_likelihoods(model, requests, row=32)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        many = log_likelihoods(jax.jit(place_parameters)(model), requests, row=32)
    np.testing.assert_allclose([x for x, _ in many], [x for x, _ in one], atol=2e-5)


@pytest.mark.parametrize("align", (1, 8))
def test_rows_are_full_and_documents_start_on_the_grid(requests, align):
    requests = [request for request in requests if sum(map(len, request)) <= 33]
    rows, places = packed(requests, 32, align)
    assert len(rows) == 4  # 97 tokens in rows of 32
    for (prefix, continuation), (at, there) in zip(requests, places):
        start = there.start - len(prefix) + 1
        tokens, targets, segments, positions = rows[at, start : there.stop].T
        assert start % align == 0
        assert [*tokens, *targets[-1:]] == prefix + continuation
        assert [*rows[at, there, 1]] == continuation
        assert len(set(segments)) == 1 and [*positions] == [*range(len(tokens))]
    used = {tuple(x) for row in rows for x in zip(row[:, 2], row[:, 3]) if x[0]}
    assert len(used) == sum(len(a) + len(b) - 1 for a, b in requests)  # no token is two's


# ---------------------------------------------------------------- completions


def written(until, text, tokens=99):
    answer = Answer(ByteTokenizer(), until)
    for byte in text.encode()[:tokens]:
        answer.add(byte)
    return answer.text, answer.ended


ANSWERS = {
    "no stop": ((), "a b", ("a b", False)),
    "end of document": ((), "a\0b", ("a", True)),
    "a stop string": (("\n", "Q:"), "a Q: b\n", ("a ", True)),
    "the first of two": (("Q:", "\n"), "a\nQ:", ("a", True)),
    "part of one": (("Q:",), "a Q", ("a Q", False)),
    "at once": ((" ",), " a", ("", True)),
    "an empty string is none": (("",), "a", ("a", False)),
    "of several bytes": (("é",), "aéb", ("a", True)),
}


@pytest.mark.parametrize("until, text, expected", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_ends_at_a_stop_string(until, text, expected):
    assert written(until, text) == expected


def greedy(model, prompt, count):
    """By a loop over the whole row."""
    ids = list(map(int, prompt))
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[len(ids) - 1].argmax()))
    new = ids[len(prompt) :]
    return ByteTokenizer().decode(new[: new.index(0)] if 0 in new else new)


def test_completions_are_the_likeliest_tokens(model, rng):
    """Of unequal prompts in one batch."""
    prompts = [rng.integers(1, VOCAB, size=n).astype(np.int32) for n in (3, 11, 8)]
    tokenizer = ByteTokenizer()
    texts = complete(model, tokenizer, prompts, tokens=6)
    assert texts == [greedy(model, prompt, 6) for prompt in prompts]
    stop = texts[1][2]
    stopped = complete(model, tokenizer, prompts, tokens=6, until=[stop])
    assert stopped == [text.split(stop)[0] for text in texts]
