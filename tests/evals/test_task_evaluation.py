"""Tasks by length: what a model answers, and what becomes of answers that are known."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import decoder

from hybridjax.config import MeshConfig
from hybridjax.data.sources import build_source, source
from hybridjax.data.tokenizer import ByteTokenizer
from hybridjax.evals import tasks
from hybridjax.sharding import make_mesh, place_parameters

TRAINED = 104
TASKS = {
    "needles": dict(type="retrieval", facts=4, queries=2),
    "story": dict(type="babilong", facts=1),
    "words": dict(type="words", letters=1, top=1),
}


def task(name, length=TRAINED, **changes):
    spec = source(**TASKS[name] | changes)
    return build_source(spec, ByteTokenizer(), seq_len=length, split="tune", seed=0)


@jax.jit
def likeliest(model, tokens):
    return jnp.argmax(model(tokens), axis=-1)


def test_answers_are_forced_and_written():
    """Against the parallel form, asked again for every token that the model writes."""
    model, exam, beyond = decoder("A"), task("needles").exam(3, TRAINED), 3
    forced, written = tasks.answers(model, exam, None, beyond)
    start = exam.asked.min()
    expected = np.asarray(likeliest(model, exam.tokens))
    np.testing.assert_array_equal(forced[:, start:], expected[:, start:])

    line = np.concatenate([exam.tokens, exam.targets[:, -1:]], axis=1)
    line = np.pad(line, ((0, 0), (0, beyond - 1)))
    own = np.pad(exam.answers > 0, ((0, 0), (0, beyond)), constant_values=True)
    for column in range(start, line.shape[1]):
        said = np.asarray(likeliest(model, line))[:, column]
        np.testing.assert_array_equal(written[:, column], said)
        if column + 1 < line.shape[1]:
            line[:, column + 1] = np.where(own[:, column], said, line[:, column + 1])
    assert (forced != written[:, :TRAINED]).any()  # else this shows nothing


@pytest.mark.slow
def test_answers_over_devices():
    model, exam = decoder("A"), task("needles").exam(3, TRAINED)
    expected = tasks.answers(model, exam, None, 3)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        found = tasks.answers(jax.jit(place_parameters)(model), exam, None, 3)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


def cell(name, right, *, times=4, written=None, **changes):
    """The cell of a model whose forced answers are `right`, an array per test and answer."""
    asked = task(name, **changes)
    exam = asked.exam(len(right), times * TRAINED)
    forced = exam.targets.copy()
    for i, a in np.argwhere(~np.asarray(right)):
        forced[i, exam.asked[i, a]] += 1
    own = forced if written is None else written(exam)
    own = np.pad(own, ((0, 0), (0, asked.beyond)), constant_values=ord("."))
    with mock.patch.object(tasks, "answers", lambda *_: (forced, own)):
        return exam, tasks.measure(
            None, ByteTokenizer(), name, asked,
            train_length=TRAINED, times=times, examples=len(right), logit_base=None,
        )  # fmt: skip


def test_a_cell_counts_answers_and_whole_tests(rng):
    right = rng.random((40, 2)) < 0.7
    exam, result = cell("needles", right)
    assert (result.length, result.examples, result.task) == (4 * TRAINED, 40, "needles")
    assert (result.exact, result.generated) == pytest.approx((right.mean(),) * 2)
    assert result.whole == pytest.approx(right.all(axis=1).mean())
    assert (result.chance, result.guess) == (0.01, 0.25)
    far = exam.distance > TRAINED
    assert 0 < far.sum() < far.size and result.deep == pytest.approx(right[far].mean())


def test_depth_is_where_the_answer_is_said():
    exam, _ = cell("needles", np.ones((60, 2), bool))
    depth = exam.evidence[..., 0] / exam.asked
    _, result = cell("needles", depth > 0.5)
    assert result.by_depth == (0.0,) * 5 + (1.0,) * 5
    assert cell("needles", depth > 0.5, times=1)[1].deep is None


def test_what_is_written_is_graded_by_the_task():
    def wordy(exam):  # the right place, as part of more words; the forced answers are wrong
        own = exam.targets.copy()
        own[exam.answers > 0] = ord("x")
        own[::2] = exam.targets[::2]
        return own

    _, result = cell("story", np.zeros((10, 1), bool), written=wordy)
    assert (result.exact, result.generated, result.whole) == (0.0, 0.5, 0.5)


def test_what_is_said_in_no_one_place_has_no_depth():
    _, result = cell("words", np.ones((3, 1), bool))
    assert result.deep is None and set(result.by_depth) == {None} and result.exact == 1.0
