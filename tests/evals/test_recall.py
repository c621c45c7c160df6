"""What is retrieved: the probes against plain NumPy, and the figures that are made of them."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import HEADS, MEMORY, decoder

from configs import hsa
from hybridjax import evaluate
from hybridjax.config import MeshConfig, UserError, typed
from hybridjax.data.sources import build_source, source
from hybridjax.data.tokenizer import ByteTokenizer
from hybridjax.evals import recall
from hybridjax.mixers.base import Context
from hybridjax.mixers.hsa import HSA
from hybridjax.mixers.retrieval import Retrieval
from hybridjax.sharding import make_mesh, place_parameters
from hybridjax.workdir import Run

STACK = "EHh"  # retrieves once, reads twice
C, LENGTH = MEMORY["chunk_size"], 72
EPS = 1e-6


@pytest.fixture(scope="module")
def exam():
    spec = source("retrieval", facts=5, queries=2)
    return build_source(spec, ByteTokenizer(), seq_len=LENGTH, split="tune", seed=0).exam(3, LENGTH)


# ---------------------------------------------------------------- a plain computation


def probed(exam):
    """What the retrieval and the two readers of the stack read, from its own blocks one by one."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), _probed(decoder(STACK), exam.tokens))


@jax.jit
def _probed(model, tokens):
    h, ctx = model.embedding(tokens, jnp.float32), Context.of_rows(tokens)
    probes = []
    for block in model._letters():

        def run(mixer, x, ctx, _):
            if isinstance(mixer, Retrieval | HSA):
                scale = (mixer.norm if isinstance(mixer, Retrieval) else mixer.query_norm).scale
                probes.append((x, mixer.query.kernel[...], scale[...], ctx.shared))
            out = mixer(x, ctx)
            return (out[0], None, out[1]) if mixer.publishes else (out, None, {})

        h, ctx, _ = block.residuals(run, h, ctx, [None] * len(block.mixers))
    return probes


def queries(exam, x, kernel, scale):
    q = x[np.arange(len(x))[:, None], exam.asked] @ kernel
    q = q.reshape(*q.shape[:2], -1, len(scale))
    return q / np.sqrt((q * q).mean(-1, keepdims=True) + EPS) * scale


def test_readings_are_a_plain_computation(exam):
    found = recall.readings(decoder(STACK), exam)
    [*choice, shared], *readers = probed(exam)
    landmarks = shared["memory"].landmarks[:, :, 0]
    scores = np.einsum("bagr,bnr->ban", queries(exam, *choice), landmarks) / 4**0.5
    for reading, [*reader, shared] in zip(found, readers, strict=True):
        keys = shared["memory"].keys[:, :, 0].reshape(len(scores), -1, C, HEADS["head_dim"])
        logits = np.einsum("bahk,bnck->bahnc", queries(exam, *reader), keys)
        mass = np.log(np.exp(logits * HEADS["head_dim"] ** -0.5).sum(-1))
        np.testing.assert_allclose(reading.scores[:, :, 0], scores, atol=2e-5)
        np.testing.assert_allclose(reading.mass, mass, atol=2e-5)
        expected = correlation(scores, mass, exam.asked // C)
        np.testing.assert_allclose(reading.correlation(), expected, atol=1e-4)


@pytest.mark.slow
def test_readings_over_devices(exam):
    expected = recall.readings(decoder(STACK), exam)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        found = recall.readings(jax.jit(place_parameters)(decoder(STACK)), exam)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        np.testing.assert_allclose(a.mass, b.mass, atol=1e-5)


def correlation(scores, mass, ended):
    each = [
        [np.corrcoef(scores[i, a, : ended[i, a]], mass[i, a, h, : ended[i, a]])[0, 1]
         for i in range(3) for a in range(2)]
        for h in range(mass.shape[2])
    ]  # fmt: skip
    return np.mean(each, axis=1)


def test_the_best_of_the_scores_are_what_the_model_selects(exam):
    reading = recall.readings(decoder(STACK), exam)[0]
    chosen = probed(exam)[1][-1]["selection"].indices[:, :, 0]
    scores = np.where(reading.visible, reading.scores[:, :, 0], -np.inf)
    for i, a in np.ndindex(exam.asked.shape):
        best = np.argsort(-scores[i, a])[: recall.top_k(decoder(STACK))]
        assert set(best) == set(chosen[i, exam.asked[i, a]])


# ---------------------------------------------------------------- figures


def reading(scores, true, mass=None, visible=None):
    scores = np.asarray(scores, float)[None, :, None]  # of one row: answers by chunks
    visible = np.ones(scores[:, :, 0].shape, bool) if visible is None else visible
    mass = scores if mass is None else np.asarray(mass, float)[None, :, None]
    return recall.Reading(scores, mass, visible, np.array([true]))


def test_rank_is_how_many_chunks_are_chosen_before():
    scores = [[3, 1, 2, 1], [3, 1, 2, 1], [0, 0, 0, 0], [9, 1, 2, 3]]
    visible = np.array([[[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]], bool)
    r = reading(scores, [2, 1, 0, 3], visible=visible)
    # equal scores: the later chunk first; what is not visible is not chosen
    np.testing.assert_array_equal(r.rank(), [[1, 3, 3, 0]])


def test_rank_of_the_group_that_sees_it_best():
    scores = np.array([[[[1, 2, 3], [3, 2, 1]]]], float)
    r = recall.Reading(scores, scores, np.ones((1, 1, 3), bool), np.array([[0]]))
    assert r.rank() == [[0]]


def test_correlation_does_not_see_hidden_chunks():
    visible = np.array([[[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
    scores, mass = [[1, 2, 3, 9], [1, 2, 3, 4]], [[20, 40, 60, -9], [2, 1, 5, 3]]
    r = reading(scores, [0, 0], mass, visible)
    np.testing.assert_allclose(r.correlation(), [1.0])  # the second sees too few to say anything
    assert np.isnan(reading(scores, [0, 0], mass, visible & False).correlation()).all()


def test_a_report_counts_what_one_visible_chunk_says(exam):
    asked = exam.asked
    first, last = exam.evidence[..., 0] // C, (exam.evidence[..., 1] - 1) // C
    found = recall.readings(decoder(STACK), exam)
    one = (first == last) & ((first + 1) * C <= asked)
    assert 0 < one.sum() < one.size
    for reading in found:
        np.testing.assert_array_equal(reading.true, np.where(one, first, -1))
    lines = recall.report(found, exam, 2)
    assert [line["layer"] for line in lines] == [0, 1]
    for line, reading in zip(lines, found):
        hits = reading.rank()[one] < 2
        assert line["answers"] == one.sum() and line["chunks"] == LENGTH // C
        assert set(line["recall"]) == {1, 2, 4, 8} and line["recall"][2] == hits.mean()
        assert line["recall"][8] == 1.0  # of at most eight
        known = [share for share in line["by_depth"] if share is not None]
        assert known and len(line["by_depth"]) == 10


@pytest.mark.parametrize(
    "back, width, true",
    [(0, 1, False), (C, C, True), (C, C + 1, False)],
    ids=["unfinished", "whole", "across"],
)
def test_only_one_whole_chunk_can_say_the_answer(exam, back, width, true):
    start = exam.asked // C * C - back
    moved = dataclasses.replace(exam, evidence=np.stack([start, start + width], axis=-1))
    reading = recall.readings(decoder(STACK), moved)[0]
    np.testing.assert_array_equal(reading.true, start // C if true else -np.ones_like(start))


def test_points_are_centred(exam):
    [reading, _] = recall.readings(decoder(STACK), exam)
    x, y = recall.points(reading)
    assert x.shape == y.shape == (HEADS["heads"] * reading.visible.sum(),)
    assert abs(x.mean()) < 1e-6 and np.std(y) > 0
    assert len(recall.points(reading, most=10)[0]) < 25


def test_a_stack_without_retrieval(exam):
    with pytest.raises(UserError, match="the stack 'SS' retrieves no chunks: choose a run of HSA"):
        recall.readings(jax.eval_shape(lambda: decoder.__wrapped__("SS")), exam)


def test_a_run_is_looked_into(tmp_path):
    config = hsa.tiny()
    config.update(seq_len=LENGTH)
    config.data.sources.facts = source("retrieval", facts=5, queries=2)
    config.evaluation.update(examples=3, lengths=(1,), tasks=("facts",))
    run = Run(tmp_path, typed(config), decoder(STACK), ByteTokenizer(), 7, {})
    with mock.patch.object(evaluate, "open_run", lambda _: run):
        cells = evaluate.report_retrieval(tmp_path)
    assert [(c["task"], c["length"], c["layer"]) for c in cells] == [
        ("facts", LENGTH, 0), ("facts", LENGTH, 1),
    ]  # fmt: skip
    assert json.loads((tmp_path / "retrieval.json").read_text())[0]["recall"]["8"] == 1.0
    assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")
