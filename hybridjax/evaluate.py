"""Measures a run: `python -m hybridjax.evaluate --workdir=runs/hypenet-tiny`.

Chooses the base of the log scaling on text, then measures held-out bits per byte and needle exact
match up to 32 times the training length, with and without the scaling. Writes `evaluation.json`
and pictures into the work directory. `--compare=DIR,DIR...` puts measured runs into one figure.
`--tasks=hellaswag,arc_easy` runs tasks of lm-evaluation-harness instead, into `tasks.json`.
"""

import dataclasses
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
from hybridjax.data.retrieval import Haystack
from hybridjax.data.text import SHA256
from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals import heldout, needle, plots
from hybridjax.files import write_json
from hybridjax.metrics import read_metrics
from hybridjax.models.decoder import Decoder
from hybridjax.workdir import Run, open_run

RESULTS, TASKS = "evaluation.json", "tasks.json"


def main() -> None:
    if flags.FLAGS.compare:
        compare([pathlib.Path(p) for p in flags.FLAGS.compare], pathlib.Path(flags.FLAGS.output))
    elif flags.FLAGS.workdir and flags.FLAGS.tasks:
        report_tasks(flags.FLAGS.workdir)
    elif flags.FLAGS.workdir:
        report(flags.FLAGS.workdir)
    else:
        raise UserError("nothing to evaluate: give --workdir=DIR or --compare=DIR,DIR")


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
    plots.needle_heatmap(results, run.workdir / "needle.png")
    print(table(results))
    print(f"numbers: {run.workdir / RESULTS}   picture: {run.workdir / 'needle.png'}")
    return results


def report_tasks(workdir: str | os.PathLike) -> None:
    """Asks the newest checkpoint of a run the tasks that the flags name."""
    from hybridjax.evals import harness  # an extra

    given = flags.FLAGS
    tasks, run = harness.Tasks(given.tasks, given.task_folder), open_run(workdir)
    model = harness.HarnessModel(run.model, run.tokenizer, run.logit_base)
    results = tasks.measure(model, given.limit)
    if jax.process_index() == 0:
        write_json(run.workdir / TASKS, harness.summary(run, results))
        print(f"{harness.table(results)}\nnumbers: {run.workdir / TASKS}")


def measure(run: Run) -> dict[str, Any]:
    """All that `evaluation.json` holds."""
    config, ev = run.config, run.config.evaluation
    longest = min(heldout.longest_row(run.tokenizer, split) for split in (ev.split, "tune"))
    lengths = tuple(t * config.seq_len for t in ev.lengths if t * config.seq_len <= longest)
    base, bits = heldout.choose_logit_base(
        run.model, run.tokenizer, lengths[-2:], ev.heldout_tokens, ev.logit_bases
    )
    bases = (None, float(config.seq_len) if base is None else base)
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
    )


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
    """The needle cells as text; `deep` are facts before the last training length."""
    show = lambda x: "   -  " if x is None else f"{x:6.3f}"
    chance = results["needle"][0]["chance"] if results["needle"] else 0.0
    lines = [
        f"{results['name']}, step {results['step']}, trained at {results['train_length']}; "
        f"needle exact match (chance {chance:g})",
        f"{'facts':>5} {'length':>8} {'':>5} {'base a':>7} {'all':>6} {'deep':>6} {'near':>6}",
    ]
    for c in results["needle"]:
        base = "none" if c["logit_base"] is None else f"{c['logit_base']:g}"
        lines.append(
            f"{c['facts']:5} {c['length']:8} {c['times']:4}x {base:>7} "
            f"{show(c['exact'])} {show(c['deep'])} {show(c['near'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run to measure")
    flags.DEFINE_list("compare", [], "measured runs to draw in one figure")
    flags.DEFINE_string("output", "comparison.png", "where the comparison's picture goes")
    flags.DEFINE_list("tasks", [], "of lm-evaluation-harness, by name")
    flags.DEFINE_string("task_folder", None, "where further tasks' yaml files are")
    flags.DEFINE_integer("limit", None, "examples per task; default: all", lower_bound=1)
    command.run(main)
