"""The evaluators, on models whose every prediction is known."""

import dataclasses
import json
import math
import pathlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run as run_command
from micro import get_config

from hybridjax import evaluate
from hybridjax.config import UserError, typed
from hybridjax.data.retrieval import Haystack, needle_batch
from hybridjax.data.sources import source
from hybridjax.data.tokenizer import ByteTokenizer
from hybridjax.evals import heldout, plots, tasks
from hybridjax.evals.batches import NO_SCALING
from hybridjax.evals.needle import needle
from hybridjax.workdir import Run

TRAINED = 64
TASK = dict(key_length=1, value_length=2, separator="")
FACT, QUESTION = map(ord, "#?")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unigram:
    """Predicts every token by the same logits; sharper as the base is far from `best`."""

    scores: jax.Array
    best: float = dataclasses.field(default=NO_SCALING, metadata={"static": True})

    def hidden(self, tokens, ctx):
        sharpness = 1 + jnp.abs(jnp.log(ctx.logit_base) - math.log(self.best)) / 4
        return jnp.broadcast_to(sharpness, (*tokens.shape, 1))

    def head_kernel(self):
        return self.scores[None]

    def logits(self, h):
        return h @ self.head_kernel()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finder(Unigram):
    """Answers a question if the fact is in the last `reach` tokens, or anywhere if logits are
    scaled; `slip` is the digit of the answer that it gets wrong (2: none)."""

    reach: int = dataclasses.field(default=TRAINED, metadata={"static": True})
    slip: int = dataclasses.field(default=2, metadata={"static": True})

    def hidden(self, tokens, ctx):
        reach = jnp.where(ctx.logit_base < NO_SCALING, tokens.shape[1], self.reach)
        t, s = jnp.mgrid[: tokens.shape[1], : tokens.shape[1]]
        found = jnp.zeros_like(tokens)
        for digit in range(2):  # how many digits after the key
            before = lambda n: jnp.roll(tokens, n + digit, axis=1)
            same = before(0)[:, :, None] == before(0)[:, None]
            asked = (before(1) == QUESTION)[:, :, None] & (before(1) == FACT)[:, None]
            near = t - digit - (s - digit - 1) < reach  # the fact's first token is in reach
            match = same & asked & near & (s < t)
            following = jnp.roll(tokens, -1, axis=1) + (self.slip == digit)
            found = jnp.max(jnp.where(match, following[:, None], found[:, :, None]), axis=2)
        return 9.0 * jax.nn.one_hot(found, self.scores.size)

    def head_kernel(self):
        return jnp.eye(self.scores.size)


def scores(rng):
    return jnp.asarray(rng.normal(size=256), jnp.float32)


# ---------------------------------------------------------------- needles


def cells_of(model, **changes):
    options = dict(train_length=TRAINED, times=4, facts=3, examples=50, logit_bases=(None, 8.0))
    return needle(model, Haystack(ByteTokenizer(), "heldout", **TASK), **options | changes)


def test_exact_match_splits_at_the_training_length(rng):
    plain, scaled = cells_of(Finder(scores(rng)), depths=10)
    assert (plain.near, plain.deep) == (1.0, 0.0)
    assert (scaled.near, scaled.deep, scaled.exact) == (1.0, 1.0, 1.0)
    assert (plain.logit_base, scaled.logit_base) == (None, 8.0)
    assert plain.length == 256 and plain.examples == 50 and plain.chance == 0.01
    assert plain.exact == pytest.approx(1 - plain.deep_examples / 50)


def test_depths_run_from_the_start_to_the_question(rng):
    [cell] = cells_of(Finder(scores(rng)), depths=10, logit_bases=(None,))
    # the last quarter of the row is in reach: of ten depths the last two or three
    assert cell.by_depth[:7] == (0.0,) * 7 and cell.by_depth[8:] == (1.0, 1.0)
    assert cell.exact == pytest.approx(np.mean(cell.by_depth))


def test_the_split_is_by_the_distance_of_each_fact(rng):
    tests = needle_batch(Haystack(ByteTokenizer(), "heldout", **TASK), 0, 30, 256, facts=3)
    assert set(tests.asked[:, 0]) == {256 - 3}
    for i, distance in enumerate(tests.distance[:, 0]):
        prompt, value = tests.tokens[i, : 256 - 2], tests.targets[i, 256 - 3 : 256 - 1]
        fact = bytes([FACT, prompt[-1], *value]) + b";"
        assert bytes(prompt[-distance:].tolist()).startswith(fact)


@pytest.mark.parametrize("slip", [0, 1])
def test_an_answer_with_one_wrong_digit_is_wrong(rng, slip):
    [cell] = cells_of(Finder(scores(rng), slip=slip), logit_bases=(8.0,))
    assert cell.exact == 0.0


def test_at_the_training_length_nothing_is_deep(rng):
    [cell] = cells_of(Finder(scores(rng)), times=1, logit_bases=(None,))
    assert cell.deep is None and cell.deep_examples == 0 and cell.near == cell.exact == 1.0


# ---------------------------------------------------------------- bits per byte


class TwoBytes(ByteTokenizer):
    """As if each token stood for two bytes."""

    def decode(self, ids):
        return "xy" * len(ids)


def test_bits_per_byte(rng):
    model, rows = Unigram(scores(rng)), rng.integers(256, size=(7, 101))
    result = heldout.bits_per_byte(model, TwoBytes(), rows)
    x = np.asarray(model.scores, np.float64)
    bits = (np.log(np.exp(x).sum()) - x[rows[:, 1:]]) / np.log(2) / 2
    assert result.bits_per_byte == pytest.approx(bits.mean(), rel=1e-5)
    assert result.positions == (32, 64, 100) and result.length == 100
    expected = [bits[:, :32].mean(), bits[:, 32:64].mean(), bits[:, 64:].mean()]
    assert result.by_position == pytest.approx(expected, rel=1e-5)


def test_rows_of_text_are_the_split(rng):
    rows = heldout.rows_of_text(ByteTokenizer(), "heldout", 100, 1000)
    assert rows.shape == (10, 101)
    everything = "\n".join([*map(str, heldout.documents("heldout"))]).encode()
    assert all(bytes(row[:90].tolist()) in everything + b"\n" for row in rows)


def frequencies():
    """Log frequencies of the tokens on which bases are compared, so that sharpness 1 is best."""
    rows = heldout.rows_of_text(ByteTokenizer(), "tune", 100, 4000)
    counts = np.bincount(rows[:, 1:].ravel(), minlength=256)
    return jnp.log(jnp.asarray((counts + 1e-6) / counts.sum(), jnp.float32))


@pytest.mark.parametrize("best", [8.0, 32.0, NO_SCALING])
def test_the_base_with_the_fewest_bits_is_chosen(best):
    model = Unigram(frequencies(), best)
    base, bits = heldout.choose_logit_base(model, ByteTokenizer(), (100,), 4000, (8.0, 32.0, 128.0))
    assert base == (None if best == NO_SCALING else best)
    assert set(bits) == {8.0, 32.0, 128.0, math.inf}
    assert min(bits.values()) == bits[best if base else math.inf]


# ---------------------------------------------------------------- the command


def run_of(model, directory, **changes) -> Run:
    config = get_config()
    config.seq_len = TRAINED
    config.data.sources.text = source("embedded", weight=0.0)
    config.evaluation.update(
        lengths=(1, 4), facts=(3, 40), examples=20, logit_bases=(8.0,),
        heldout_tokens=512, task=TASK,
    )
    config.evaluation.update(changes)
    return Run(pathlib.Path(directory), typed(config), model, ByteTokenizer(), 7, {})


def test_what_is_measured(rng, tmp_path):
    """The base that is better on text is used, and 40 facts are left out where they do not fit."""
    model = Finder(scores(rng))
    chosen = (8.0, {8.0: 1.0, math.inf: 2.0})
    with mock.patch.object(heldout, "choose_logit_base", lambda *_: chosen):
        results = evaluate.measure(run_of(model, tmp_path))
    found = {(c["facts"], c["times"], c["logit_base"]): c for c in results["needle"]}
    assert set(found) == {(3, t, b) for t in (1, 4) for b in (None, 8.0)}
    assert found[3, 4, None]["deep"] == 0.0 and found[3, 4, 8.0]["deep"] == 1.0
    assert [(t["length"], t["logit_base"]) for t in results["heldout"]] == [
        (64, None), (64, 8.0), (256, None), (256, 8.0),
    ]  # fmt: skip
    assert results["tune_bits_per_byte"] == {"8": 1.0, "none": 2.0}
    assert results["tokens"] == 7 * 4 * TRAINED and results["logit_base"] == 8.0


def test_without_candidates_nothing_is_scaled(rng, tmp_path):
    run = run_of(Unigram(scores(rng)), tmp_path, logit_bases=(), facts=(3,), lengths=(1,))
    results = evaluate.measure(run)
    assert results["logit_base"] is None
    assert [c["logit_base"] for c in results["needle"] + results["heldout"]] == [None, None]


def test_tasks_that_the_configuration_names_are_asked(tmp_path):
    run = run_of(None, tmp_path, tasks=("facts",), facts=(), lengths=(1, 2), examples=3)
    asked = []

    def answers(model, exam, base, beyond):
        asked.append((exam.tokens.shape, base))
        return exam.targets, exam.targets

    text = heldout.Heldout(TRAINED, None, 1.0, (TRAINED,), (1.0,))
    with (
        mock.patch.object(heldout, "choose_logit_base", lambda *_: (8.0, {8.0: 1.0})),
        mock.patch.object(heldout, "bits_per_byte", lambda *_: text),
        mock.patch.object(tasks, "answers", answers),
    ):
        results = evaluate.measure(run)
    assert asked == [((3, TRAINED), 8.0), ((3, 2 * TRAINED), 8.0)] and not results["needle"]
    assert [(c["task"], c["times"], c["exact"]) for c in results["tasks"]] == [
        ("facts", 1, 1.0), ("facts", 2, 1.0),
    ]  # fmt: skip
    plots.tasks(results, tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").read_bytes().startswith(PNG)
    assert "       facts      128    2x  1.000  1.000  1.000  1.000" in evaluate.table(results)


PNG = b"\x89PNG\r\n\x1a\n"


def test_a_report_leaves_numbers_and_pictures_which_can_be_compared(rng, tmp_path):
    lines = [dict(step=i, loss=1.0 / i, answer_accuracy=0.1 * i) for i in range(1, 5)]
    stored = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = run_of(Finder(scores(rng)), tmp_path / name)
        with (
            mock.patch.object(evaluate, "open_run", lambda _, run=run: run),
            mock.patch.object(evaluate, "read_metrics", lambda _: lines),
            mock.patch.object(evaluate, "update_metadata", lambda *args: stored.append(args)),
        ):
            results = evaluate.report(tmp_path / name)
        assert json.loads((tmp_path / name / "evaluation.json").read_text()) == json.loads(
            json.dumps(results)
        )
        for picture in ("loss.png", "needle.png"):
            assert (tmp_path / name / picture).read_bytes().startswith(PNG)
    assert stored[0][1:] == (7, {"logit_base": results["logit_base"]})

    output = tmp_path / "both.png"
    done = run_command(
        "evaluate", f"--compare={tmp_path}/one,{tmp_path}/two", f"--output={output}"
    )
    assert done.code == 0 and output.read_bytes().startswith(PNG)
    assert done.out.count("step 7, trained at 64; needle exact match (chance 0.01)") == 2


def test_faults(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not measured: run hybridjax.evaluate --workdir="):
        evaluate.compare([tmp_path], tmp_path / "both.png")
    config = run_of(None, tmp_path).config
    with pytest.raises(UserError, match="tasks names 'mq', which is not in config.data.sources"):
        evaluate.task_of(config, ByteTokenizer(), "mq")
    with pytest.raises(UserError, match="of type 'embedded', which asks nothing: name one that"):
        evaluate.task_of(config, ByteTokenizer(), "text")
    assert run_command("evaluate").error.startswith("nothing to evaluate: give --workdir=DIR")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run_command("evaluate", f"--workdir={tmp_path}", "--harness=hellaswag")
    assert done.error.endswith("pip install 'hybridjax[eval]'")
