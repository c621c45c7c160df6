"""Processes that are killed at any moment, half of them while they write a checkpoint."""

import multiprocessing
import pathlib
import random
import signal
import time
from collections.abc import Callable

forks = multiprocessing.get_context("forkserver")  # so that a start needs no imports


def preload(*modules: str) -> None:
    forks.set_forkserver_preload(["hybridjax.train", "hybridjax.evaluate", "commands", *modules])


def start(child: Callable, *args, reach: int = 1) -> multiprocessing.Process:
    """A running `child(*args, progress)` that has sent the number `reach`."""
    received, progress = forks.Pipe(duplex=False)
    process = forks.Process(target=child, args=(*args, progress))
    process.received = received  # or the child could not send any more
    process.start()
    while process.is_alive() and not (received.poll(0.01) and received.recv() >= reach):
        pass
    return process


def saving(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def kill(
    process: multiprocessing.Process,
    rng: random.Random,
    within: float,
    workdir: pathlib.Path | None = None,
) -> None:
    """Kills within so many seconds; given a run's directory, of the begin of its next save."""
    while workdir and process.is_alive() and not saving(workdir):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, within))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL  # it was not done before


def finish(process: multiprocessing.Process) -> None:
    process.join()
    assert process.exitcode == 0
