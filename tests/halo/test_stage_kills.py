"""A conversion that is killed at any moment of any stage ends as if it had not been."""

import itertools
import json
import pathlib
import random
import time
from unittest import mock

import pytest
from commands import each_batch, end_state, run, use_compiled
from kills import finish, kill, preload, saving, start

from hybridjax.halo import report, selection, stages

pytest_plugins = ("commands",)
CONFIG = pathlib.Path(__file__).parent / "micro_halo.py"
RUNS = {"teacher": "pretrain", "align": "align", "distill": "distill", "finetune": "finetune"}
WHERE = ("teacher", "align", "select", "distill", "finetune")
KILLS = 4  # of each
STEPS = 40  # a kill comes before the tenth step of a process
SETTINGS = (
    *(f"--config.{section}.steps={STEPS}" for section in RUNS.values()),
    "--config.checkpoint.every=2",
    "--config.log_every=3",
)


def child(workdir, compiled, names, progress):
    """Runs stages in a process of its own; says how many batches it has drawn of the one that was
    not done, or how many models it has begun to measure."""
    measure, measured = selection.measure, itertools.count(1)

    def draw(number, batch):
        progress.send(number)
        time.sleep(0.05)

    def slow_measure(*args):
        progress.send(next(measured))
        time.sleep(0.3)
        return measure(*args)

    with (
        use_compiled(compiled),
        each_batch(draw),
        mock.patch.object(selection, "measure", slow_measure),
        mock.patch.object(report, "report"),
    ):
        flags = f"--config={CONFIG}:micro", f"--workdir={workdir}", f"--stages={names}"
        raise SystemExit(run("distill", *flags, *SETTINGS).code)


@pytest.mark.slow
def test_a_killed_conversion_ends_as_if_it_had_not_been(tmp_path, compiled):
    preload("hybridjax.distill")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(child, whole, compiled, ",".join(stages.STAGES))
    rng, within = random.Random(0), 0
    for directory in WHERE:
        args = killed, compiled, "transfer" if directory == "teacher" else directory
        for number in range(KILLS):
            if directory == "select":
                kill(start(child, *args, reach=rng.randint(1, 2)), rng, 0.1)
                continue
            process = start(child, *args, reach=rng.randint(1, 5))
            kill(process, rng, 0.1, killed / directory if number % 2 else None)
            within += saving(killed / directory)
        finish(start(child, *args))
    finish(undisturbed)
    for directory in RUNS:
        assert end_state(killed / directory) == end_state(whole / directory)
        assert end_state(killed / directory)["step"] == STEPS
    assert scores(killed) == scores(whole)
    assert within
    print(f"{within} of {KILLS * len(WHERE)} kills were within a save")


def scores(workdir):
    return json.loads((workdir / "select" / "scores.json").read_text())
