"""Reading only what later tokens depend on leaves the same state behind, for less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybridjax import generate
from hybridjax.config import MeshConfig, ModelConfig, UserError, typed
from hybridjax.evals import needle
from hybridjax.evals.questions import ask, write_answers
from hybridjax.mixers import chunk_memory
from hybridjax.mixers.base import Context
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters

VOCAB, PIECE = 23, 4
HEADS = dict(heads=2, head_dim=8)
WINDOW = mixer("attention", window=5, rope=True, **HEADS)
FFN = mlp("swiglu", hidden=16)
MEMORY = dict(chunk_size=4, kv_heads=1, head_dim=8, landmark_dim=8, encoder_heads=2, hidden=16)
RETRIEVAL = mixer("retrieval", groups=1, landmark_dim=8, top_k=2, every=2)
READ = mixer("hsa", **HEADS)
LEGEND = dict(
    S=block(WINDOW, mlp=FFN),
    E=block(mixer("chunk_encoder", **MEMORY)),
    H=block(WINDOW, RETRIEVAL, READ, mlp=FFN, residual="bypass"),
    h=block(READ, mlp=FFN),
    A=block(mixer("attention", **HEADS), mlp=FFN),
)


@functools.cache
def decoder(layers):
    config = dict(layers=layers, blocks=LEGEND, width=16, vocab=VOCAB, embedding_std=0.5)
    config = typed(ConfigDict(config), ModelConfig)
    return jax.jit(lambda: Decoder(config, jax.random.key(7)))()


def test_beside_an_accelerator_the_host_needs_room_for_its_part_alone(monkeypatch):
    model = decoder("SEHhS")
    monkeypatch.setattr(generate.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(generate.host_memory, "free_bytes", lambda: 100)
    generate.new_state(model, 1, 48)
    keys_and_values = 2 * 48 * 8 * 4
    with pytest.raises(UserError, match=f"needs {keys_and_values:,} bytes of host memory"):
        generate.new_state(model, 1, 48, chunks_on_host=True)


DEPTHS = {  # letters that read every token, and the reach of those above
    "SEHhS": (2, 4 + 1 + 0 + 4),
    "SS": (0, 8),
    "SAS": (2, 4),
    "SEHA": (4, 0),
}


@pytest.mark.parametrize("layers", DEPTHS)
def test_what_must_read_every_token(layers):
    model = jax.eval_shape(lambda: decoder.__wrapped__(layers))  # the cache is for real ones
    assert (model.memory_depth, model.tail) == DEPTHS[layers]


@jax.jit
def parallel(model, tokens):
    return model(tokens)


@pytest.mark.parametrize(
    ("layers", "lengths", "piece", "least"),
    [
        pytest.param("SEHhS", [43, 22, 3], 4, 4, marks=pytest.mark.slow),
        ("SEHhS", [43, 43, 43], 32, 1),
        pytest.param("SS", [43, 22, 3], 4, 4, marks=pytest.mark.slow),
        ("SAS", [43, 22, 3], 4, 4),
    ],
)
def test_a_prefix_read_for_its_end_alone_goes_on_as_if_read_whole(
    rng, layers, lengths, piece, least, monkeypatch
):
    """The tail of the longest row spans three borders of chunks, and of a piece."""
    model, more = decoder(layers), 5
    tokens = rng.integers(1, VOCAB, (3, 43 + more))
    skipped = []
    remember = generate.remember_piece
    monkeypatch.setattr(generate, "remember_piece", lambda *a: skipped.append(1) or remember(*a))
    rows = [row[:length] for row, length in zip(tokens, lengths)]
    state = generate.new_state(model, 3, 48)
    state, logits = generate.prefill(model, rows, state, piece=piece)
    assert len(skipped) >= least
    assert state.length.tolist() == lengths
    following = np.stack([row[n : n + more] for row, n in zip(tokens, lengths)])
    h, state = jax.jit(lambda m, t, s: m.extend(t, s))(model, jnp.asarray(following), state)
    after, expected = jax.jit(lambda m, h: m.logits(h))(model, h), parallel(model, tokens)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(logits[i], expected[i, n - 1], atol=2e-5)
        np.testing.assert_allclose(after[i], expected[i, n : n + more], atol=2e-5)


@pytest.mark.slow
def test_needles_are_judged_in_pieces_as_in_whole_rows(rng, monkeypatch):
    model, tokens = decoder("SEHhS"), rng.integers(1, VOCAB, (2, 43))
    monkeypatch.setattr(needle, "PIECE", PIECE)
    whole = needle._predict(model, tokens, Context.of_rows(tokens), 9)
    pieces = needle._predict_in_pieces(model, tokens, jnp.float32(1e30), 9)
    np.testing.assert_array_equal(pieces, whole)


def continued(model, rows, chunks_on_host, more):
    """Logits and hidden states of rows read in pieces, the last `more` tokens one by one."""
    state = generate.new_state(model, len(rows), 48, chunks_on_host)
    read = [row[: len(row) - more] for row in rows]
    state, logits = generate.prefill(model, read, state, piece=16)
    outs, step = [logits], jax.jit(lambda m, t, s: m.extend(t, s), donate_argnums=2)
    for i in range(-more, 0):
        h, state = step(model, jnp.asarray([[row[i]] for row in rows]), state)
        outs.append(h)
    return outs, state


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, 4])
def test_chunks_on_the_host_give_the_same_bits(rng, monkeypatch, more):
    """One row has more chunks than stay on the device; the state's size is its formula."""
    recent = 2
    monkeypatch.setattr(chunk_memory, "RECENT", recent)
    model, rows = decoder("EH"), [rng.integers(1, VOCAB, n) for n in (43, 9)]
    expected, state = continued(model, rows, False, more)
    found, on_host = continued(model, rows, True, more)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    (B, C, D), N, (G, K) = (2, 4, 16), 48 // 4, (1, 8)
    chunks, recent = (4 * B * n * C * G * 2 * K for n in (N, recent))
    assert generate.host_bytes(on_host) == chunks and generate.host_bytes(state) == 0
    assert generate.state_bytes(on_host) == generate.state_bytes(state) + recent
    on_device = generate.state_bytes(on_host.layers[0]) - chunks
    assert on_device == recent + 4 * B * (C * D + N * G * K + 1)  # 1: its length


@pytest.mark.slow
def test_a_memory_in_half_precision_is_near(rng, monkeypatch):
    rows = [rng.integers(1, VOCAB, 43)]
    (expected,), _ = continued(decoder("EH"), rows, True, 0)
    half = block(mixer("chunk_encoder", **MEMORY, state_dtype="float16"))
    monkeypatch.setitem(LEGEND, "E", half)
    model = jax.jit(lambda: decoder.__wrapped__("EH"))()
    (found,), state = continued(model, rows, True, 0)
    assert state.layers[0][0].keys.dtype == jnp.float16
    error = np.abs(np.asarray(found) - np.asarray(expected)).max()
    assert 0 < error < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("chunks_on_host", [False, True], ids=["device", "host"])
def test_a_prefix_is_read_on_any_mesh(rng, chunks_on_host):
    rows = [rng.integers(1, VOCAB, n) for n in (43, 9)]
    (expected,), _ = continued(decoder("EH"), rows, False, 0)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        model = jax.jit(lambda: place_parameters(decoder.__wrapped__("EH")))()
        (found,), state = continued(model, rows, chunks_on_host, 0)
        kind = state.layers[0][0].keys.sharding.memory_kind
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert kind == ("pinned_host" if chunks_on_host else "device")


@pytest.mark.parametrize(
    "chunks_on_host",
    [pytest.param(False, id="device"), pytest.param(True, id="host", marks=pytest.mark.slow)],
)
def test_many_questions_of_one_prefix(rng, chunks_on_host):
    """Questions that complete chunks leave no trace for those after them."""
    model, prefix = decoder("SEHhS"), rng.integers(1, VOCAB, 22)
    questions = jnp.asarray(rng.integers(1, VOCAB, (3, 7)))
    state = generate.new_state(model, 1, 32, chunks_on_host)
    state, _ = generate.prefill(model, [prefix], state, piece=PIECE)
    rows = np.concatenate([np.tile(prefix, (3, 1)), questions], axis=1)
    expected = jnp.argmax(parallel(model, rows), axis=-1)[:, 22:]
    state, first = ask(model, state, questions)
    np.testing.assert_array_equal(first, expected)
    state, again = ask(model, state, questions[::-1])
    np.testing.assert_array_equal(again, expected[::-1])
    assert state.length.tolist() == [22]


@pytest.mark.slow
def test_answers_are_written_one_token_after_the_other(rng):
    """As by reading the row again for each token; the last one completes a chunk."""
    model, prefix = decoder("SEHhS"), rng.integers(1, VOCAB, 22)
    questions = jnp.asarray(rng.integers(1, VOCAB, (3, 3)))
    state, _ = generate.prefill(model, [prefix], generate.new_state(model, 1, 32), piece=PIECE)
    state, found = write_answers(model, state, questions, 4)
    state, again = write_answers(model, state, questions[::-1], 4)
    rows = np.pad(np.concatenate([np.tile(prefix, (3, 1)), questions], axis=1), ((0, 0), (0, 4)))
    for end in range(25, 29):
        rows[:, end] = jnp.argmax(parallel(model, rows)[:, end - 1], axis=-1)
    np.testing.assert_array_equal(found, rows[:, 25:])
    np.testing.assert_array_equal(again, found[::-1])
    assert state.length.tolist() == [22]
