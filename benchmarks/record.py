"""What every benchmark does with its figures: take turns, summarise, say where, keep them."""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def take_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Times of every repeat, by side and clock. The sides alternate, so that what else the machine
    does disturbs all of them; each is called once before, to compile."""
    times = {name: {clock: [] for clock in CLOCKS} for name in sides}
    for repeat in range(repeats + 1):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            start = {clock: read() for clock, read in CLOCKS.items()}
            sides[name]()
            for clock, read in CLOCKS.items():
                if repeat:
                    times[name][clock].append(read() - start[clock])
    return times


def spread(values, digits: int = 3) -> dict:
    """The median and the quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": round(median, digits), "quartiles": [round(low, digits), round(high, digits)]}


def machine() -> dict[str, str]:
    """The processor, the accelerator if there is one, and the versions behind a figure."""
    devices = jax.devices()
    accelerator = {} if devices[0].platform == "cpu" else {"device": devices[0].device_kind}
    return dict(
        cpu=cpu_name(), cores=str(len(os.sched_getaffinity(0))), **accelerator,
        jax=jax.__version__, commit=commit(),
    )  # fmt: skip


def cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def compiled(flags: Sequence[str], timeout: float) -> dict:
    """The JSON of `hybridjax.compile` in a process of its own, or what went wrong as `failure`;
    and the flags, to repeat it. `timeout` in seconds."""
    record, start = dict(flags=list(flags)), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "cell.json"
        command = [sys.executable, "-m", "hybridjax.compile", *flags, f"--json={path}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return record | dict(failure=f"not compiled within {timeout:.0f} s")
        record["seconds"] = time.perf_counter() - start
        if path.exists():
            return record | json.loads(path.read_text())
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return record | dict(failure=lines[-1] if lines else f"exit code {done.returncode}")


def save(path: pathlib.Path, text: str) -> None:
    """Replaces the file in one move, so that a stopped run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
