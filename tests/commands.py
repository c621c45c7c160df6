"""Commands run inside the test's process, as `python -m` would run them, on one device.

A pytest plugin: test modules that use its fixtures name it in `pytest_plugins`.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import runpy
import signal
import sys
import warnings
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint import v1 as ocp

from hybridjax import evaluate
from hybridjax.metrics import read_metrics

MICRO = pathlib.Path(__file__).parent / "micro.py"
TIMING = ("tokens_per_second", "mfu")


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    warnings: list[str]

    @property
    def error(self) -> str:
        """The one line of a refused command."""
        assert self.code == 1 and self.err.startswith("error: "), self
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self
        return self.err.removeprefix("error: ").rstrip("\n")


def run(command: str, *args: str) -> Done:
    """Exit code and output of `python -m hybridjax.COMMAND ARGS`."""
    out, err, warned = io.StringIO(), io.StringIO(), _Lines()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warned:
        with _as_alone([command, *map(str, args)]):
            try:
                runpy.run_module(f"hybridjax.{command}", run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code
    return Done(code, out.getvalue(), err.getvalue(), warned.lines)


def train(workdir, *settings: str, config: str = f"{MICRO}:micro", report=False) -> Done:
    """`report`: whether a finished run is measured, which takes longer than the run."""
    measured = contextlib.nullcontext() if report else mock.patch.object(evaluate, "report")
    with measured:
        return run("train", f"--config={config}", f"--workdir={workdir}", *settings)


def end_state(workdir) -> dict:
    """What must not depend on how often a run was interrupted, bit for bit."""
    directory = pathlib.Path(workdir).resolve() / "checkpoints"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.training.Checkpointer(directory) as checkpointer:
        step = checkpointer.latest.step
        saved = checkpointer.checkpointables_metadata(step).metadata
        parts = checkpointer.load_checkpointables(
            step,
            {
                part: {
                    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
                    for name, x in saved[part].items()
                }
                for part in ("model", "opt_state", "step")
            },
        )
    arrays = {
        f"{part}/{name}": np.asarray(x).tobytes()
        for part, leaves in parts.items()
        for name, x in leaves.items()
    }
    [data] = (directory / str(step) / "data").glob("*.json")
    metrics = [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in read_metrics(workdir)
    ]
    return dict(step=step, arrays=arrays, data=json.loads(data.read_text()), metrics=metrics)


def files(directory) -> dict[str, bytes]:
    paths = sorted(p for p in pathlib.Path(directory).rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


@contextlib.contextmanager
def each_batch(f):
    """`f(number, batch)` is called with each batch of a run, from 1, before the run gets it."""
    from hybridjax.data import pipeline

    make = pipeline.make_loader
    with mock.patch.object(pipeline, "make_loader", lambda *a, **k: _Watched(make(*a, **k), f)):
        yield


class _Watched:
    def __init__(self, loader, f):
        self._loader, self._f, self._number = loader, f, 0

    def __next__(self):
        batch = next(self._loader)
        self._number += 1
        self._f(self._number, batch)
        return batch

    def __getattr__(self, name):
        return getattr(self._loader, name)

    async def save(self, directory):  # Orbax looks for it in the class
        return await self._loader.save(directory)

    async def load(self, directory):
        return await self._loader.load(directory)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A directory of compiled programs, so that each is compiled once for all runs."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # that of all workers
    (root / "compiled").mkdir(exist_ok=True)
    return root / "compiled"


@pytest.fixture
def shared_compilation(compiled):
    with use_compiled(compiled):
        yield


@contextlib.contextmanager
def use_compiled(directory):
    options = dict(
        jax_compilation_cache_dir=str(directory),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=0,
    )
    before = {name: getattr(jax.config, name) for name in options}
    update = lambda values: [jax.config.update(name, value) for name, value in values.items()]
    with mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(directory)):
        try:
            update(options)
            compilation_cache.reset_cache()
            yield
        finally:
            update(before)
            compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, compiled) -> pathlib.Path:
    """The work directory of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    with use_compiled(compiled):
        done = train(workdir, report=True)
    assert done.code == 0, done
    return workdir


@contextlib.contextmanager
def _as_alone(argv: list[str]):
    known, handler = set(flags.FLAGS), signal.getsignal(signal.SIGTERM)
    one_device = mock.patch.object(jax, "device_count", lambda: 1)
    try:
        with mock.patch.object(sys, "argv", argv), one_device, jax.set_mesh(None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
                yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        for name in set(flags.FLAGS) - known:
            if not name.startswith("grain_"):  # Grain defines its own on first use
                delattr(flags.FLAGS, name)


class _Lines(logging.Handler):
    """The warnings of hybridjax while it is entered, a line each."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("hybridjax").addHandler(self)

    def __exit__(self, *_):
        logging.getLogger("hybridjax").removeHandler(self)
