"""Runs of several processes on this host: their numbers, their agreement, and their faults."""

import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest
from commands import MICRO, TIMING, each_batch, end_state, run, use_compiled
from jax._src import compiler
from safetensors.numpy import load_file

from hybridjax import evaluate, processes
from hybridjax.checkpoint import restore_model
from hybridjax.config import MeshConfig, UserError, typed
from hybridjax.metrics import read_metrics
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters
from hybridjax.workdir import load_config

forks = multiprocessing.get_context("forkserver")  # so that a start needs no imports
TRAIN = ("train", f"--config={MICRO}:micro")
PATIENT = 120  # seconds: longer than anything takes on a busy machine


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    text: str  # all it wrote

    @property
    def error(self) -> str:
        """Its one line, if it failed as it should."""
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert self.code == 1 and len(lines) == 1 and "Traceback" not in self.text, self
        return lines[0].removeprefix("error: ")


def child(argv, devices, log, programs, acts, measured):
    """`python -m hybridjax.COMMAND ARGS`; `acts`: what it does to itself at which batch."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    # jax lets only process 0 keep compiled programs, and compilation is most of a test's time.
    everyone_keeps = types.SimpleNamespace(
        global_state=types.SimpleNamespace(process_id=0, client=None)
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_compiled(programs))
        stack.enter_context(each_batch(lambda number, batch: act(acts.get(number, ()))))
        stack.enter_context(mock.patch.object(compiler, "distributed", everyone_keeps))
        if not measured:
            nothing = lambda *args: {"heldout_bits_per_byte": 8.0}
            stack.enter_context(mock.patch.object(evaluate, "during_training", nothing))
            stack.enter_context(mock.patch.object(evaluate, "report"))
        sys.argv = argv
        try:
            runpy.run_module(f"hybridjax.{argv[0]}", run_name="__main__")
        finally:
            sys.stdout.flush()
            jax.distributed.shutdown()  # as at the exit of an interpreter


def act(what):
    for do in what:
        if isinstance(do, signal.Signals):
            os.kill(os.getpid(), do)
        elif isinstance(do, str):
            raise UserError(do)
        else:
            time.sleep(do)


class Run:
    """Several processes that were started together."""

    def __init__(
        self, tmp_path, programs, *args, count=2, devices=2, acts=(), own=(), measured=False
    ):
        """`acts` and `own`: by process, what it does to itself, and further arguments."""
        forks.set_forkserver_preload(["hybridjax.train", "hybridjax.generate", "commands"])
        tmp_path.mkdir(parents=True, exist_ok=True)
        self.logs = [tmp_path / f"log{i}_{time.monotonic_ns()}" for i in range(count)]
        acts, own, port = dict(acts), dict(own), free_port()
        self.processes = []
        for i, log in enumerate(self.logs):
            several = (f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={i}")
            argv = [*map(str, args), *own.get(i, ()), *(several if count > 1 else ())]
            process = forks.Process(
                target=child,
                args=(argv, devices, str(log), programs, acts.get(i, {}), measured),
            )
            process.start()
            self.processes.append(process)

    def ended(self) -> list[Ended]:
        for process in self.processes:
            process.join(PATIENT)
            process.kill()
            process.join()
        codes = (process.exitcode for process in self.processes)
        return [Ended(code, log.read_text()) for code, log in zip(codes, self.logs)]


def shared(tmp_path_factory, name, make):
    """A directory that `make` fills once for all of pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            make(root / f"{name}.part")
            (root / f"{name}.part").rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return shared(tmp_path_factory, "programs", lambda path: path.mkdir())


@pytest.fixture
def start(tmp_path, programs):
    """`start(ARGS, ...)` is a `Run`; what is left of it at the end is killed."""
    runs = []

    def begin(*args, **options):
        runs.append(Run(tmp_path / "logs", programs, *args, **options))
        return runs[-1]

    yield begin
    for process in (process for started in runs for process in started.processes):
        process.kill()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, programs):
    """The work directory of two processes of two devices that were never interrupted."""

    def make(path):
        ended = Run(path / "logs", programs, *TRAIN, f"--workdir={path}/run").ended()
        assert codes(ended) == [0, 0], ended

    return shared(tmp_path_factory, "whole", make) / "run"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def losses(workdir) -> dict[tuple[int, str], float]:
    lines = read_metrics(workdir)
    skipped = ("step", "learning_rate", *TIMING)
    return {(x["step"], n): v for x in lines for n, v in x.items() if n not in skipped}


def codes(ended) -> list[int]:
    return [e.code for e in ended]


# ---------------------------------------------------------------- numbers


def test_two_processes_train_as_one(start, whole, tmp_path):
    [alone] = start(*TRAIN, f"--workdir={tmp_path}", count=1, devices=4).ended()
    assert alone.code == 0, alone
    assert_close(whole, tmp_path, 1e-6)


def assert_close(workdir, other, tolerance):
    """Two runs that saw the same rows."""
    expected, found = losses(other), losses(workdir)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=tolerance), key
    assert end_state(workdir)["data"] == end_state(other)["data"]


MESHES = {1: {}, 2: dict(fsdp=2), 4: dict(tensor=2), 8: dict(fsdp=2, tensor=2)}


@pytest.mark.parametrize(
    "devices", [pytest.param(n, marks=[pytest.mark.slow] * (n != 8)) for n in MESHES]
)
def test_logits_are_the_same_on_other_devices(whole, devices):
    tokens = np.random.default_rng(0).integers(0, 256, (4, 32))
    expected, found = (
        logits(whole, make_mesh(MeshConfig(**mesh), jax.devices()[:count]), tokens)
        for count, mesh in ((4, {}), (devices, MESHES[devices]))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def logits(workdir, mesh, tokens):
    config = typed(load_config(workdir))
    with jax.set_mesh(mesh):
        new = lambda: place_parameters(Decoder(config.model, jax.random.key(0)))
        model, _, _ = restore_model(workdir, jax.jit(new).eval_shape())
        f = jax.jit(lambda m, t: m.logits(m.hidden(t, Context.of_rows(t))))
        return np.asarray(f(model, tokens))


@pytest.mark.slow
def test_evaluation_and_generation_on_two_processes(start, tmp_path):
    both = start(*TRAIN, f"--workdir={tmp_path}/two", measured=True).ended()
    one = start(*TRAIN, f"--workdir={tmp_path}/one", measured=True, count=1, devices=4).ended()
    assert codes(both + one) == [0, 0, 0], both + one
    results = [
        json.loads((tmp_path / run / evaluate.RESULTS).read_text()) for run in ("one", "two")
    ]
    assert results[0].keys() == results[1].keys()
    for a, b in zip(*(result["heldout"] for result in results)):
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-6)
    talk = ("generate", f"--workdir={tmp_path}/two", "--tokens=8")
    asked = [f"--prompt={text}" for text in ("#a12; ?a", "abc", "x")]  # three rows, four devices
    saved = [f"--save_state={tmp_path}/{n}" for n in (1, 2)]
    first, _ = start(*talk, *asked, saved[0]).ended()
    [alone] = start(*talk, *asked, saved[1], count=1, devices=1).ended()
    assert answers(first) == answers(alone) != ""
    states = [load_file(tmp_path / str(n)) for n in (1, 2)]
    for name, x in states[0].items():
        np.testing.assert_allclose(x, states[1][name], rtol=1e-4, atol=1e-5)
    again, _ = start(*talk, f"--load_state={tmp_path}/2").ended()
    assert answers(again) == answers(first)


def answers(ended):
    """What was said, without the titles."""
    assert ended.code == 0, ended
    return re.sub("(?m)^> .*$", ">", re.search(r"(?ms)^> .*(?=^\[(read|state))", ended.text)[0])


# ---------------------------------------------------------------- stopping and going on


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, programs):
    """The work directory of a run that ended by a notice to its second process."""

    def make(path):
        acts = {1: {3: (signal.SIGTERM, 0.5)}}  # a notice takes a moment to go round
        ended = Run(path / "logs", programs, *TRAIN, f"--workdir={path}/run", acts=acts).ended()
        step = end_state(path / "run")["step"]
        assert codes(ended) == [0, 0] and 3 <= step < 7, ended
        assert f"stopped at step {step}; the same command resumes" in ended[0].text
        assert "step" not in ended[1].text  # the first alone speaks

    return shared(tmp_path_factory, "stopped", make) / "run"


def test_a_notice_to_one_stops_all_and_the_same_command_resumes(start, whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    ended = start(*TRAIN, f"--workdir={tmp_path}/run").ended()
    assert codes(ended) == [0, 0], ended
    assert f"resumed at step {end_state(stopped)['step']}" in ended[0].text
    assert end_state(tmp_path / "run") == end_state(whole)


OTHERS = {
    "one process": pytest.param(1, 4, (), marks=pytest.mark.slow),
    "four processes": pytest.param(4, 2, ("fsdp=2", "tensor=2"), marks=pytest.mark.slow),
    "along the context": pytest.param(2, 1, ("data=1", "context=2"), marks=pytest.mark.slow),
}


@pytest.mark.parametrize("count, devices, mesh", OTHERS.values(), ids=OTHERS)
def test_a_run_goes_on_elsewhere(start, whole, stopped, tmp_path, count, devices, mesh):
    shutil.copytree(stopped, tmp_path / "run")
    settings = [f"--config.mesh.{axis}" for axis in mesh]
    command = (*TRAIN, f"--workdir={tmp_path}/run", *settings)
    ended = start(*command, count=count, devices=devices).ended()
    assert codes(ended) == [0] * count, ended
    assert_close(tmp_path / "run", whole, 1e-5)


# ---------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_part_of_a_checkpoint_that_only_one_process_reads_is_damaged(start, tmp_path):
    command = (*TRAIN, f"--workdir={tmp_path}/run", "--config.mesh.fsdp=4", "--config.mesh.data=1")
    assert codes(start(*command).ended()) == [0, 0]
    expected = end_state(tmp_path / "run")
    parts = (tmp_path / "run/checkpoints/7/model/ocdbt.process_1/d").iterdir()
    largest = max(parts, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    first, second = start(*command).ended()
    assert "checkpoint 7 in" in second.error and "to use the one before" in second.error
    assert "process 1 has failed (checkpoint 7 in" in first.error
    ended = start(*command).ended()
    assert codes(ended) == [0, 0] and "resumed at step 6" in ended[0].text, ended
    assert end_state(tmp_path / "run") == expected


def test_a_killed_process_ends_the_others_and_leaves_a_checkpoint(start, tmp_path):
    acts, limits = {1: {5: (signal.SIGKILL,)}}, ("--lost_after=10", "--config.checkpoint.every=1")
    first, second = start(*TRAIN, f"--workdir={tmp_path}/run", *limits, acts=acts).ended()
    assert second.code == -signal.SIGKILL
    silent = r"process 1 has been silent for 10 s, last heard of at"  # or its collective failed
    assert re.match(rf"process 0: ({silent}|INTERNAL: .* the same command resumes$)", first.error)
    assert end_state(tmp_path / "run")["step"] in (3, 4)  # a save waits for the one before


@pytest.mark.slow
def test_a_hung_step_is_noticed(start, tmp_path):
    acts, limits = {1: {5: (1.5, signal.SIGSTOP)}}, ("--hang_after=3",)
    both = start(*TRAIN, f"--workdir={tmp_path}/run", *limits, acts=acts)
    both.processes[0].join(PATIENT)
    both.processes[1].kill()
    line = both.ended()[0].error
    assert re.match(r"process 0: step 5 has not ended for 3 s; .* processes 1 \(at 4\);", line)


@pytest.mark.slow
def test_a_fault_of_one_process_ends_all(start, tmp_path):
    acts = {1: {3: ("the disk of this host is full",)}}
    first, second = start(*TRAIN, f"--workdir={tmp_path}/run", acts=acts).ended()
    assert second.error == "process 1: the disk of this host is full"
    assert first.error == "process 0: process 1 has failed (the disk of this host is full)"


def test_different_configs_are_refused_by_all(start, tmp_path):
    own = {1: ["--config.optimizer.b1=0.8", "--config.steps=8"]}
    ended = start(*TRAIN, f"--workdir={tmp_path}/run", own=own).ended()
    for i, line in enumerate(e.error for e in ended):
        assert re.match(
            f"process {i}: processes 0 and 1 differ in config.optimizer.b1 and 1 more: 0.9 and 0.8",
            line,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", (0, 1))
def test_a_coordinator_that_is_not_reached(start, process):
    where = f"localhost:{free_port()}"
    flags = (f"--coordinator={where}", "--processes=2", f"--process={process}")
    [ended] = start(*TRAIN, *flags, "--coordinator_timeout=3", count=1).ended()
    assert re.match(f"not all processes met at the coordinator {where} within 3 s", ended.error)


FLAGS = {
    "some of three": (["--coordinator=here:1"], "--processes and --process not given"),
    "beyond the last": (
        ["--coordinator=here:1", "--processes=2", "--process=2"],
        "--process=2 of 2: count from 0",
    ),
}


@pytest.mark.parametrize("flags, line", FLAGS.values(), ids=FLAGS)
def test_flags_that_make_no_sense(flags, line):
    assert line in run(*TRAIN, *flags).error


ENVIRONMENTS = {
    "a laptop": (dict(TPU_SKIP_MDS_QUERY="1"), False),
    "SLURM": (dict(SLURM_NTASKS="4", TPU_SKIP_MDS_QUERY="1"), True),
    "a SLURM job of one": (dict(SLURM_NTASKS="1", TPU_SKIP_MDS_QUERY="1"), False),
    "Open MPI": (dict(OMPI_COMM_WORLD_SIZE="2", TPU_SKIP_MDS_QUERY="1"), True),
    "an indexed job": (dict(JOB_COMPLETION_INDEX="0", TPU_SKIP_MDS_QUERY="1"), True),
    "GKE": (dict(TPU_WORKER_HOSTNAMES="a,b"), True),
    "a notebook with a TPU": (dict(TPU_PROCESS_ADDRESSES="local"), False),
    "several slices": (dict(MEGASCALE_NUM_SLICES="2", TPU_WORKER_HOSTNAMES="a"), True),
    "a TPU VM": ({}, True),
}


@pytest.mark.parametrize("environment, others", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_where_other_processes_are_looked_for(environment, others):
    with mock.patch.dict(os.environ, environment, clear=True):
        assert processes._environment_names_others() == others


VARIABLES = dict(zip(processes.VARIABLES, ("h:1", "4", "2"), strict=True))
GIVEN = {
    "nothing": ({}, {}, (None, None, None)),
    "variables": (VARIABLES, {}, ("h:1", 4, 2)),
    "flags go first": (VARIABLES, dict(process=0), (None, None, 0)),
    "an address alone": ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, (None, None, None)),
}


@pytest.mark.parametrize("environment, given, expected", GIVEN.values(), ids=GIVEN)
def test_what_numbers_the_processes(environment, given, expected, monkeypatch):
    values = dict.fromkeys(("coordinator", "processes", "process")) | given
    monkeypatch.setattr(processes.flags, "FLAGS", types.SimpleNamespace(**values))
    with mock.patch.dict(os.environ, environment, clear=True):
        assert tuple(processes._given().values()) == expected


@pytest.mark.slow
def test_killed_again_and_again(start, tmp_path):
    """Any process, at any moment, many of them during a save."""
    rng = random.Random(0)
    settings = ("--config.checkpoint.every=2", "--config.steps=60", "--lost_after=10")
    command = lambda name: (*TRAIN, f"--workdir={tmp_path}/{name}", *settings)
    assert codes(start(*command("whole")).ended()) == [0, 0]
    resumed = 0
    for _ in range(20):
        victim, batch = rng.randrange(2), rng.randrange(1, 6)
        delay = rng.uniform(0, rng.choice((0.1, 3.0)))  # half of them during a save
        acts = {victim: {batch: (delay, signal.SIGKILL)}}
        ended = start(*command("killed"), acts=acts).ended()
        assert ended[victim].code == -signal.SIGKILL and ended[1 - victim].code != 0, ended
        resumed += "resumed at step" in ended[0].text
    assert resumed
    assert codes(start(*command("killed")).ended()) == [0, 0]
    assert end_state(tmp_path / "killed") == end_state(tmp_path / "whole")


# ---------------------------------------------------------------- the launcher


def local(*args, **options):
    return subprocess.run(
        ["launch/local.sh", *args], capture_output=True, text=True, timeout=PATIENT, **options
    )


def test_what_the_launcher_would_run():
    lines = local("--dry-run", "2", "4", "--", "python", "-m", "x", "--config=a b").stdout
    port = re.search("localhost:([0-9]+)", lines)[1]
    assert lines.splitlines() == [
        f"env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python -m x --config=a\\ b "
        f"--coordinator=localhost:{port} --processes=2 --process={i} "
        for i in range(2)
    ]
    assert "JAX_LOCAL_DEVICE_IDS=1 python" in local("--dry-run", "2", "--", "python").stdout


@pytest.mark.parametrize("args", [(), ("two", "--", "true"), ("2",), ("2", "--"), ("2", "true")])
def test_the_launcher_tells_its_usage(args):
    done = local(*args)
    assert done.returncode == 2 and done.stderr.startswith("local.sh: usage: ")


@pytest.mark.slow
def test_the_launcher_ends_as_the_first_that_fails():
    began = time.monotonic()
    script = 'echo $JAX_NUM_CPU_DEVICES ${!#}; [[ ${!#} == *1 ]] && exit 7; trap "" TERM; sleep 60'
    done = local("3", "2", "--", "bash", "-c", script, "name")
    assert done.returncode == 7 and "process 1 ended with exit code 7" in done.stderr
    assert "[2] 2 --process=2" in done.stdout
    assert time.monotonic() - began < 30


def test_the_launcher_hands_on_a_notice():
    script = 'trap "echo noticed; exit 0" TERM; echo ready; for ((;;)); do sleep 0.1; done'
    with subprocess.Popen(
        ["launch/local.sh", "2", "--", "bash", "-c", script], stdout=subprocess.PIPE, text=True
    ) as launched:
        heard = []
        while sum("ready" in line for line in heard) < 2:
            heard.append(launched.stdout.readline())
        launched.send_signal(signal.SIGTERM)
        rest = launched.stdout.read()
    assert launched.returncode == 0 and rest.count("noticed") == 2
