"""Generation: reading in pieces, drawing, states that are kept, and the command."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from ml_collections import ConfigDict

from hybridjax import generate, host_memory, workdir
from hybridjax.config import MeshConfig, ModelConfig, UserError, typed
from hybridjax.data.tokenizer import load_tokenizer
from hybridjax.mixers.base import Context
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters

VOCAB = 256
GREEDY = functools.partial(generate.sample, temperature=0.0)
HEADS = dict(heads=2, head_dim=8)


@functools.cache
def model(layers="LA"):
    ffn = mlp("swiglu", hidden=16)
    legend = dict(
        A=block(mixer("attention", **HEADS), mlp=ffn),
        L=block(mixer("lightning", **HEADS), mlp=ffn),
        W=block(mixer("attention", window=4, rope=True, **HEADS), mlp=ffn),
    )
    shape = dict(width=16, vocab=VOCAB, embedding_std=1.0)
    config = ConfigDict(dict(layers=layers, blocks=legend, **shape))
    return jax.jit(lambda: Decoder(typed(config, ModelConfig), jax.random.key(3)))()


@pytest.fixture
def prompts(rng):
    return [rng.integers(1, VOCAB, size=n).astype(np.int32) for n in (11, 3, 8)]


@jax.jit
def forward(model, tokens, logit_base=None):
    return model(tokens, Context.of_rows(tokens, logit_base=logit_base))


def last_logits(prompt, room=24, **rest):
    """By the parallel form; padded behind, so that there is one shape."""
    padded = np.zeros((1, room), np.int32)
    padded[0, : len(prompt)] = prompt
    return forward(model(), padded, **rest)[0, len(prompt) - 1]


def read(prompts, piece=4, room=24, **rest):
    state = generate.new_state(model(), len(prompts), room)
    return generate.prefill(model(), prompts, state, piece=piece, **rest)


def write(prefix, count, sampler=GREEDY):
    stream = generate.decode(model(), prefix, jax.random.key(0), sampler)
    return np.stack([next(stream) for _ in range(count)], axis=1)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("piece", [1, 4, 16])
def test_reading_in_pieces_is_the_parallel_form(prompts, piece):
    state, logits = read(prompts, piece)
    assert state.length.tolist() == [11, 3, 8]
    for row, prompt in zip(logits, prompts, strict=True):
        close(row, last_logits(prompt))


def test_reading_scales_logits(prompts):
    base = jnp.float32(5)
    _, logits = read(prompts, logit_base=base)
    for row, prompt in zip(logits, prompts, strict=True):
        close(row, last_logits(prompt, logit_base=base))
    assert not np.allclose(logits, read(prompts)[1], atol=1e-3)


def test_any_length_compiles_once(rng):
    before = generate.read_piece._cache_size()
    for length in (1, 4, 7, 30):
        state = generate.new_state(model(), 1, 40)
        generate.prefill(model(), [rng.integers(1, VOCAB, length)], state, piece=5)
    assert generate.read_piece._cache_size() == before + 1


def test_greedy_decoding_takes_the_likeliest_token_of_the_parallel_form(prompts):
    tokens = write(read(prompts), 5)
    for row, prompt in zip(tokens, prompts, strict=True):
        whole = list(prompt)
        for token in row:
            assert token == jnp.argmax(last_logits(whole))
            whole.append(int(token))


def test_rows_of_a_batch_are_as_if_alone(prompts):
    together = write(read(prompts), 5)
    for row, prompt in zip(together, prompts, strict=True):
        assert write(read([prompt]), 5)[0].tolist() == row.tolist()


MESHES = [
    pytest.param(
        MeshConfig(data=2, tensor=2, fsdp=2), id="batch and heads", marks=pytest.mark.slow
    ),
    pytest.param(MeshConfig(data=2, context=4), id="split caches"),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_mesh(prompts, mesh):
    batch = [prompts[0], prompts[1], prompts[2], prompts[0]]
    expected = write(read(batch), 3)
    with jax.set_mesh(make_mesh(mesh)):
        sharded = place_parameters(model())
        state = generate.new_state(sharded, 4, 24)
        prefix = generate.prefill(sharded, batch, state, piece=4)
        stream = generate.decode(sharded, prefix, jax.random.key(0), GREEDY)
        assert np.stack([next(stream) for _ in range(3)], axis=1).tolist() == expected.tolist()


@pytest.mark.slow
def test_a_split_cache_is_saved_and_forked(prompts, tmp_path):
    """Two questions of one prefix, read on a mesh with split caches, kept and loaded there."""
    prefix, questions, path = prompts[0], prompts[1:], str(tmp_path / "state")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        sharded = place_parameters(model("AW"))
        state = generate.new_state(sharded, 1, 24)
        cache = state.layers[0][0].keys
        assert cache.addressable_shards[0].data.shape == (1, 6, 2, 8)
        generate.save_prefix(path, generate.prefill(sharded, [prefix], state, piece=4))
        loaded = generate.load_prefix(path, sharded)
        assert loaded[0].layers[0][0].keys.sharding == cache.sharding
        state, _ = generate.fork(loaded, 2)
        asked = generate.prefill(sharded, questions, state, piece=4)
        stream = generate.decode(sharded, asked, jax.random.key(0), GREEDY)
        tokens = np.stack([next(stream) for _ in range(3)], axis=1)
    state = generate.new_state(model("AW"), 2, 24)
    both = [np.concatenate([prefix, question]) for question in questions]
    alone = generate.prefill(model("AW"), both, state, piece=4)
    stream = generate.decode(model("AW"), alone, jax.random.key(0), GREEDY)
    assert tokens.tolist() == np.stack([next(stream) for _ in range(3)], axis=1).tolist()


# ---------------------------------------------------------------- drawing

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
DRAWS = {
    "all": (dict(), PROBABILITIES),
    "top-k": (dict(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
    "top-k beyond the vocabulary": (dict(top_k=9), PROBABILITIES),
    "top-p, just reached": (dict(top_p=0.7499), [2 / 3, 1 / 3, 0, 0, 0]),
    "top-p, just passed": (dict(top_p=0.76), [5 / 9, 5 / 18, 1 / 6, 0, 0]),
    "top-p, less than the first": (dict(top_p=0.01), [1, 0, 0, 0, 0]),
    "both": (dict(top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0, 0]),
    "temperature": (dict(temperature=0.5), PROBABILITIES**2 / sum(PROBABILITIES**2)),
    "greedy": (dict(temperature=0.0), [1, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("options, expected", DRAWS.values(), ids=DRAWS.keys())
def test_draws_have_the_distribution(rng, options, expected):
    order, count = rng.permutation(5), 20_000
    logits = jnp.log(jnp.asarray(PROBABILITIES[order]))
    tokens = generate.sample(jnp.tile(logits, (count, 1)), jax.random.key(1), **options)
    found = np.bincount(np.asarray(tokens), minlength=5) / count
    np.testing.assert_allclose(found, np.asarray(expected)[order], atol=0.015)
    assert ((found == 0) >= (np.asarray(expected)[order] == 0)).all()


# ---------------------------------------------------------------- states


def test_questions_of_one_saved_prefix_are_as_if_asked_alone(prompts, tmp_path):
    prefix, questions, path = prompts[0], prompts[1:], str(tmp_path / "state")
    generate.save_prefix(path, read([prefix]))
    state, _ = generate.fork(generate.load_prefix(path, model()), 2)
    together = write(generate.prefill(model(), questions, state, piece=4), 3)
    for row, question in zip(together, questions, strict=True):
        alone = write(read([np.concatenate([prefix, question])]), 3)
        assert row.tolist() == alone[0].tolist()


def test_a_loaded_state_goes_on_where_it_was(prompts, tmp_path):
    path = str(tmp_path / "state")
    generate.save_prefix(path, read(prompts))
    loaded = generate.load_prefix(path, model())
    assert loaded[0].max_length == 24 and loaded[0].length.tolist() == [11, 3, 8]
    assert write(loaded, 4).tolist() == write(read(prompts), 4).tolist()


def test_faults_of_states(prompts, tmp_path, monkeypatch):
    path = tmp_path / "state"
    generate.save_prefix(str(path), read(prompts))
    with pytest.raises(UserError, match="the state of another model"):
        generate.load_prefix(str(path), model("LW"))
    with pytest.raises(UserError, match="has 3 rows and there are 2 prompts"):
        generate.fork(generate.load_prefix(str(path), model()), 2)
    with pytest.raises(UserError, match="beyond the last position"):
        generate.new_state(model(), 1, 2**25 + 1)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match="needs .* bytes of host memory and 1,000 are free: give"):
        generate.new_state(model(), 1, 512)


# ---------------------------------------------------------------- the command


@pytest.fixture
def talk(tmp_path):
    """Runs the command with a model that is not trained."""
    opened = mock.Mock(model=model(), tokenizer=load_tokenizer("bytes"), logit_base=None)
    with mock.patch.object(workdir, "open_run", lambda _: opened):
        yield lambda *args: run("generate", "--workdir=x", *args)


def test_the_command_writes_what_decoding_gives(talk):
    done = talk("--prompt=ab", "--tokens=6")
    expected = write(read([np.array([97, 98])], room=512), 6)[0]
    assert done.code == 0, done
    text, notes = done.out.split("\n[read 2 tokens in ")
    assert text == load_tokenizer("bytes").decode(expected.tolist())
    assert "wrote " in notes and "tokens/s" in notes
    assert f"state {generate.state_bytes(generate.new_state(model(), 1, 512)):,} bytes" in notes


def test_the_command_asks_many_questions_of_one_state(talk, tmp_path):
    path = tmp_path / "state"
    assert talk("--prompt=abc", "--tokens=2", "--max_length=24", f"--save_state={path}").code == 0
    alone = talk("--prompt=abc", "--tokens=2", "--max_length=24")
    again = talk(f"--load_state={path}", "--tokens=2")
    assert again.out.split("\n[")[0] == alone.out.split("\n[")[0]
    both = talk(f"--load_state={path}", "--prompt=de", "--prompt=fgh", "--tokens=2")
    for question in ("de", "fgh"):
        answer = talk(f"--prompt=abc{question}", "--tokens=2", "--max_length=24").out
        assert f"> {question}\n{answer.split(chr(10) + '[')[0]}\n" in both.out
    full = talk(f"--load_state={path}", "--prompt=" + 20 * "x", "--tokens=2")
    assert full.error.startswith("25 tokens (3 read before) do not fit into a state for 24")


def test_a_row_ends_with_its_document(talk):
    """The second row's document ends after two tokens; the first one goes on."""
    script = [[5, 66], [65, 0], [66, 67], [67, 68]]
    with mock.patch.object(generate.itertools, "islice", lambda *_: map(np.array, script)):
        done = talk("--prompt=a", "--prompt=b", "--tokens=4")
    assert "> a\n\x05ABC\n" in done.out and "> b\nB\n" in done.out


FAULTS = {
    "no prompt": ([], "no prompt: give --prompt=TEXT"),
    "empty prompt": (["--prompt="], "no prompt: give --prompt=TEXT"),
    "missing prompt file": (["--prompt_file=/none"], "cannot read the prompt /none"),
    "prompt beyond max_length": (
        ["--prompt=abcdef", "--max_length=8", "--tokens=3"],
        "9 tokens do not fit into a state for 8",
    ),
    "missing state": (["--load_state=/none", "--prompt=a"], "/none is not a saved state"),
    "not a state": ([f"--load_state={__file__}"], f"{__file__} is not a saved state"),
    "no place for a state": (
        ["--prompt=a", "--tokens=1", "--save_state=/none/state"],
        "cannot write the state /none/state",
    ),
}


@pytest.mark.parametrize("args, message", FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_one_line(talk, args, message):
    assert talk(*args).error.startswith(message)


def test_a_command_without_a_run():
    assert run("generate").error == "no model: give --workdir=runs/NAME"
    assert "no hybridjax run in /none" in run("generate", "--workdir=/none", "--prompt=a").error
