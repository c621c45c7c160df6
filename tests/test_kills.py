"""Runs that are killed at any moment, some of them during a save, end as if they had not been."""

import multiprocessing
import random
import signal
import time

import pytest
from commands import each_batch, end_state, train, use_compiled

pytest_plugins = ("commands",)
SETTINGS = ("--config.checkpoint.every=2", "--config.log_every=3")
forks = multiprocessing.get_context("forkserver")  # so that a start needs no imports


def child(workdir, compiled, steps, began):
    """Trains in a process of its own, slowly enough to be killed."""

    def slow(number, batch):
        if number == 1:
            began.send(number)
        time.sleep(0.05)

    with use_compiled(compiled), each_batch(slow):
        raise SystemExit(train(workdir, f"--config.steps={steps}", *SETTINGS).code)


def start(*args):
    """A running child that has drawn its first batch."""
    began, begin = forks.Pipe(duplex=False)
    process = forks.Process(target=child, args=(*args, begin))
    process.start()
    while process.is_alive() and not began.poll(0.01):
        pass
    return process


def kill_and_restart(kills, rng, workdir, *args) -> int:
    """Kills at random moments, half of them once a save has begun; how many were within a save."""
    within = 0
    saving = lambda: any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))
    for kill in range(kills):
        process = start(workdir, *args)
        if kill % 2:
            while process.is_alive() and not saving():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 2.0))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was not done before
        within += saving()
    process = start(workdir, *args)
    process.join()
    assert process.exitcode == 0
    return within


@pytest.mark.slow  # tests/test_processes.py kills one of two by default
@pytest.mark.parametrize("kills", (2, 20))
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, compiled, kills):
    forks.set_forkserver_preload(["hybridjax.train", "hybridjax.evaluate", "commands"])
    args = compiled, 12 + 8 * kills
    whole = start(tmp_path / "whole", *args)
    within = kill_and_restart(kills, random.Random(kills), tmp_path / "killed", *args)
    whole.join()
    assert whole.exitcode == 0
    assert end_state(tmp_path / "killed") == end_state(tmp_path / "whole")
    assert end_state(tmp_path / "killed")["step"] == args[1]
    assert within
    print(f"{within} of {kills} kills were within a save")
