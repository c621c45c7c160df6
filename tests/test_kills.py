"""Runs that are killed at any moment, some of them during a save, end as if they had not been."""

import random
import time

import pytest
from commands import each_batch, end_state, train, use_compiled
from kills import finish, kill, preload, saving, start

pytest_plugins = ("commands",)
SETTINGS = ("--config.checkpoint.every=2", "--config.log_every=3")


def child(workdir, compiled, steps, progress):
    """Trains in a process of its own, slowly enough to be killed."""

    def slow(number, batch):
        progress.send(number)
        time.sleep(0.05)

    with use_compiled(compiled), each_batch(slow):
        raise SystemExit(train(workdir, f"--config.steps={steps}", *SETTINGS).code)


@pytest.mark.slow  # tests/test_processes.py kills one of two by default
@pytest.mark.parametrize("kills", (2, 20))
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, compiled, kills):
    preload()
    args, rng, within = (compiled, 12 + 8 * kills), random.Random(kills), 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(child, whole, *args)
    for number in range(kills):
        process = start(child, killed, *args)
        if number % 2:
            kill(process, rng, 0.1, killed)
        else:
            kill(process, rng, 2.0)
        within += saving(killed)
    finish(start(child, killed, *args))
    finish(undisturbed)
    assert end_state(killed) == end_state(whole)
    assert end_state(killed)["step"] == args[1]
    assert within
    print(f"{within} of {kills} kills were within a save")
