"""Measures a run: `python -m hybridjax.evaluate --workdir=runs/hypenet-tiny`.

Chooses the base of the log scaling on text, then measures held-out bits per byte and needle exact
match up to 32 times the training length, with and without the scaling; then the tasks that the
configuration names. Writes `evaluation.json` and pictures into the work directory.
`--compare=DIR,DIR...` puts measured runs into one figure. `--retrieval` looks into a run of HSA
instead: whether the chunk that says the answer is retrieved, and what its landmark's score means.
`--harness=hellaswag,arc_easy` runs tasks of lm-evaluation-harness, into `harness.json`.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from hybridjax import command
from hybridjax.checkpoint import update_metadata
from hybridjax.config import Config, UserError
from hybridjax.data.retrieval import Haystack, needle_batch
from hybridjax.data.sources import build_source
from hybridjax.data.tasks import Task
from hybridjax.data.text import SHA256
from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals import heldout, needle, plots, recall, tasks
from hybridjax.files import write_json
from hybridjax.metrics import read_metrics
from hybridjax.models.decoder import Decoder
from hybridjax.workdir import Run, open_run

RESULTS, HARNESS = "evaluation.json", "harness.json"
RETRIEVAL = "retrieval"  # .json, .png
LONGEST_LOOK = 16384  # tokens of a row whose retrieval is looked into, all at once


def main() -> None:
    given = flags.FLAGS
    if given.compare:
        compare([pathlib.Path(p) for p in given.compare], pathlib.Path(given.output))
    elif not given.workdir:
        raise UserError("nothing to evaluate: give --workdir=DIR or --compare=DIR,DIR")
    elif given.harness:
        report_harness(given.workdir)
    elif given.retrieval:
        report_retrieval(given.workdir)
    else:
        report(given.workdir)


def report(workdir: str | os.PathLike) -> dict[str, Any]:
    """Measures the newest checkpoint of a run; writes numbers and pictures beside it."""
    run = open_run(workdir)
    results = measure(run)
    if jax.process_index() != 0:
        return results
    update_metadata(workdir, run.step, {"logit_base": results["logit_base"]})
    (run.workdir / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    plots.loss(read_metrics(workdir), run.workdir / "loss.png", title=run.config.name)
    plots.heldout(results, run.workdir / "heldout.png")
    pictures = {"needle": plots.needle_heatmap, "tasks": plots.tasks}
    drawn = [run.workdir / f"{name}.png" for name in pictures if results[name]]
    for path in drawn:
        pictures[path.stem](results, path)
    print(table(results))
    print("   ".join([f"numbers: {run.workdir / RESULTS}", *(f"picture: {p}" for p in drawn)]))
    return results


def report_harness(workdir: str | os.PathLike) -> None:
    """Asks the newest checkpoint of a run the tasks that the flags name."""
    from hybridjax.evals import harness  # an extra

    given = flags.FLAGS
    tasks, run = harness.Tasks(given.harness, given.task_folder), open_run(workdir)
    model = harness.HarnessModel(run.model, run.tokenizer, run.logit_base)
    results = tasks.measure(model, given.limit)
    if jax.process_index() == 0:
        write_json(run.workdir / HARNESS, harness.summary(run, results))
        print(f"{harness.table(results)}\nnumbers: {run.workdir / HARNESS}")


def measure(run: Run) -> dict[str, Any]:
    """All that `evaluation.json` holds."""
    config, ev = run.config, run.config.evaluation
    longest = min(heldout.longest_row(run.tokenizer, split) for split in (ev.split, "tune"))
    lengths = tuple(t * config.seq_len for t in ev.lengths if t * config.seq_len <= longest)
    base, bits = heldout.choose_logit_base(
        run.model, run.tokenizer, lengths[-2:], ev.heldout_tokens, ev.logit_bases
    )
    scaled = float(config.seq_len) if base is None else base
    bases = (None, scaled) if ev.logit_bases else (None,)
    texts = [
        heldout.bits_per_byte(
            run.model,
            run.tokenizer,
            heldout.rows_of_text(run.tokenizer, ev.split, length, ev.heldout_tokens),
            b,
        )
        for length in lengths
        for b in bases
    ]
    haystack = Haystack(run.tokenizer, ev.split, **ev.task)
    cells = [
        cell
        for facts in ev.facts
        for cell in needle.by_length(
            run.model,
            haystack,
            train_length=config.seq_len,
            times=ev.lengths,
            facts=facts,
            examples=ev.examples,
            logit_bases=bases if facts == ev.facts[0] else (base,),
        )
    ]
    answered = tasks.by_length(
        run.model,
        run.tokenizer,
        {name: task_of(config, run.tokenizer, name) for name in ev.tasks},
        train_length=config.seq_len,
        times=ev.lengths,
        examples=ev.examples,
        logit_base=base,
    )
    return dict(
        name=config.name,
        step=run.step,
        seed=config.seed,
        train_length=config.seq_len,
        tokens=run.step * config.batch_size * config.seq_len,
        text_sha256=SHA256,
        split=ev.split,
        logit_base=base,
        tune_bits_per_byte={
            "none" if math.isinf(b) else f"{b:g}": value for b, value in bits.items()
        },
        heldout=[dataclasses.asdict(t) for t in texts],
        needle=[dataclasses.asdict(c) for c in cells],
        tasks=[dataclasses.asdict(c) for c in answered],
    )


def task_of(config: Config, tokenizer: Tokenizer, name: str) -> Task:
    """The task that a source of the configuration is, over the split to be measured."""
    if name not in config.data.sources:
        raise UserError(
            f"config.evaluation.tasks names {name!r}, which is not in config.data.sources: add it "
            "there, with weight 0 if nothing is to be trained on it"
        )
    spec = config.data.sources[name]
    task = build_source(
        spec, tokenizer, seq_len=config.seq_len, split=config.evaluation.split, seed=0
    )
    if not isinstance(task, Task):
        raise UserError(
            f"config.evaluation.tasks names {name!r}, a source of type {spec['type']!r}, which "
            "asks nothing: name one that is a task"
        )
    return task


# ---------------------------------------------------------------- what is retrieved


def report_retrieval(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Looks at what the newest checkpoint retrieves; writes numbers and a picture beside it."""
    run = open_run(workdir)
    cells, layer, points = measure_retrieval(run)
    if jax.process_index() != 0:
        return cells
    numbers, picture = (run.workdir / f"{RETRIEVAL}.{kind}" for kind in ("json", "png"))
    numbers.write_text(json.dumps(cells, indent=1, allow_nan=False) + "\n")
    plots.retrieval(cells, layer, points, picture, title=run.config.name)
    for c in cells:
        shares = {k: "-" if share is None else f"{share:.3f}" for k, share in c["recall"].items()}
        recalled = "  ".join(f"@{k} {share}" for k, share in shares.items())
        print(f"{c['task']:>12} {c['length']:8} layer {c['layer']}: recall {recalled}")
    print(f"numbers: {numbers}   picture: {picture}")
    return cells


def measure_retrieval(run: Run) -> tuple[list[dict[str, Any]], int, tuple]:
    """Cells of `recall.report` by task and length; and of the first of these the layer that finds
    the most, and its scores and masses of chunks."""
    config, ev = run.config, run.config.evaluation
    top_k, cells, layer, points = recall.top_k(run.model), [], None, None
    exams = {name: task_of(config, run.tokenizer, name).exam for name in ev.tasks}
    if ev.facts and not exams:
        haystack = Haystack(run.tokenizer, ev.split, **ev.task)
        exams["needle"] = functools.partial(needle_batch, haystack, 0, facts=ev.facts[0])
    for name, exam_of in exams.items():
        for times in ev.lengths:
            if (length := times * config.seq_len) > LONGEST_LOOK:
                continue
            exam = exam_of(n=ev.examples, length=length)
            readings = recall.readings(run.model, exam, run.logit_base)
            lines = recall.report(readings, exam, top_k)
            if not cells:
                layer = max(lines, key=lambda line: line["recall"][top_k] or 0)["layer"]
                points = recall.points(readings[layer])
            cells += [
                dict(task=name, length=length, train_length=config.seq_len, **line)
                for line in lines
            ]
    if not cells:
        raise UserError(
            f"nothing to look into: config.evaluation needs tasks or facts, and lengths of at most "
            f"{LONGEST_LOOK} tokens"
        )
    return cells, layer, points


def during_training(model: Decoder, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """The few numbers that a run logs as it goes, without log scaling."""
    ev, length = config.evaluation, config.seq_len
    rows = heldout.rows_of_text(tokenizer, ev.split, length, ev.heldout_tokens)
    text = heldout.bits_per_byte(model, tokenizer, rows)
    results = {"heldout_bits_per_byte": text.bits_per_byte}
    haystack = Haystack(tokenizer, ev.split, **ev.task)
    for facts in ev.facts[:1]:
        fitting = needle.fitting(haystack, length, ev.lengths, facts)
        for cell in needle.by_length(
            model,
            haystack,
            train_length=length,
            times=fitting[::3][:2],
            facts=facts,
            examples=100,
            logit_bases=(None,),
        ):
            results[f"needle_{cell.times}x"] = cell.exact
    return results


def compare(workdirs: Sequence[pathlib.Path], output: pathlib.Path) -> None:
    """One figure of needle exact match by length over several measured runs."""
    results = []
    for workdir in workdirs:
        path = workdir / RESULTS
        if not path.exists():
            raise UserError(
                f"{workdir} is not measured: run hybridjax.evaluate --workdir={workdir}"
            )
        results.append(json.loads(path.read_text()))
    if jax.process_index() == 0:
        plots.needle_lines(results, output)
    for result in results:
        print(table(result))
    print(f"picture: {output}")


def table(results: dict[str, Any]) -> str:
    """The cells as text; `deep` is what the text says before the last training length."""
    show = lambda x: "   -  " if x is None else f"{x:6.3f}"
    title = f"{results['name']}, step {results['step']}, trained at {results['train_length']}; "
    lines = []
    if results["needle"]:
        lines += [
            f"{title}needle exact match (chance {results['needle'][0]['chance']:g})",
            f"{'facts':>5} {'length':>8} {'':>5} {'base a':>7} {'all':>6} {'deep':>6} {'near':>6}",
        ]
    for c in results["needle"]:
        base = "none" if c["logit_base"] is None else f"{c['logit_base']:g}"
        lines.append(
            f"{c['facts']:5} {c['length']:8} {c['times']:4}x {base:>7} "
            f"{show(c['exact'])} {show(c['deep'])} {show(c['near'])}"
        )
    if asked := results.get("tasks"):
        lines += [
            f"{title}answers of tasks, teacher-forced (deep: of these) and generated (whole: all "
            "answers of a test); chance, and a guess among what the text says",
            f"{'task':>12} {'length':>8} {'':>5} {'forced':>6} {'deep':>6} {'gener.':>6} "
            f"{'whole':>6} {'chance':>6} {'guess':>6}",
        ]
        lines += [
            f"{c['task']:>12} {c['length']:8} {c['times']:4}x {show(c['exact'])} "
            f"{show(c['deep'])} {show(c['generated'])} {show(c['whole'])} {show(c['chance'])} "
            f"{show(c['guess'])}"
            for c in asked
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run to measure")
    flags.DEFINE_bool("retrieval", False, "look at what the run retrieves (HSA), nothing else")
    flags.DEFINE_list("compare", [], "measured runs to draw in one figure")
    flags.DEFINE_string("output", "comparison.png", "where the comparison's picture goes")
    flags.DEFINE_list("harness", [], "tasks of lm-evaluation-harness, by name")
    flags.DEFINE_string("task_folder", None, "where further tasks' yaml files are")
    flags.DEFINE_integer("limit", None, "examples per task; default: all", lower_bound=1)
    command.run(main)
