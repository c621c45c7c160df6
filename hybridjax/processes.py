"""The processes of one run: how they meet, agree, stop together, and notice that one is lost.

A run on several hosts is one program in several processes, each with devices of its own. Process 0
hosts jax's coordination service. A laptop's run is one process, for which nothing here does
anything.

    --coordinator=HOST:PORT --processes=N --process=I    where no cluster says it

The variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say the same.

Every process gives a sign of life, with the last step it has completed, to all the others. One
that is silent, one that has failed and a step that does not end are each reported in one line by
all the others, which then end with exit code 1, so that whatever started them can start them again.
"""

import collections
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from hybridjax.config import UserError

BEAT = 1.0  # seconds between signs of life
PER_PROCESS = 0.02  # seconds more for each process, so that process 0 can serve them all
TICK = 0.2  # seconds between two looks at the clocks
LATER = 60  # seconds by which jax's own limits, which abort without a line, are later than ours
KEYS = "hybridjax/processes/"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_watch: "Watch | None" = None


def define_flags() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if no cluster says it")
    flags.DEFINE_integer("processes", None, "how many there are", lower_bound=1)
    flags.DEFINE_integer("process", None, "which of them this is, from 0", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "seconds for all to meet", lower_bound=1)
    flags.DEFINE_integer("lost_after", 60, "seconds of silence that end a run", lower_bound=3)
    flags.DEFINE_integer("hang_after", 600, "seconds of one step that end a run", lower_bound=1)


# ---------------------------------------------------------------- meeting


def start(preemptible: bool) -> None:
    """Joins the other processes, if the flags or the environment speak of any.

    Must come before anything that asks jax for its devices.

    Args:
      preemptible: SIGTERM is a notice that `StopRequest` reports; else it ends the process.

    Raises:
      UserError: only some of the flags are given, or the environment's cluster is not usable.
    """
    global _watch
    given = _given()
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} not given: give all of --{', --'.join(given)}")
    if not missing and given["process"] >= given["processes"]:
        raise UserError(f"--process={given['process']} of {given['processes']}: count from 0")
    if (not missing and given["processes"] == 1) or (missing and not _environment_names_others()):
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    if not _initialize(*given.values(), flags.FLAGS.coordinator_timeout):
        return
    state = _private_state()
    if state.num_processes > 1:
        limits = flags.FLAGS.lost_after, flags.FLAGS.hang_after
        _watch = Watch(state.client, state.process_id, state.num_processes, *limits)
    if state.process_id > 0:  # what process 0 says is enough
        sys.stdout = open(os.devnull, "w")
        logging.getLogger("hybridjax").setLevel(logging.ERROR)


def _given() -> dict[str, str | int | None]:
    """By the flags, or by the variables of a launcher that numbers the processes itself."""
    names = ("coordinator", "processes", "process")
    by_flags = {name: getattr(flags.FLAGS, name) for name in names}
    address, *counts = (os.environ.get(variable) for variable in VARIABLES)
    if any(x is not None for x in by_flags.values()) or not (address and all(counts)):
        return by_flags
    return dict(zip(names, (address, *map(int, counts)), strict=True))


def _environment_names_others() -> bool:
    """Whether it is worth asking jax which cluster this is.

    Asking anywhere would take minutes where a host calls itself a cluster of one, as some notebooks
    do.
    """
    env = os.environ
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(int(env.get(name) or 1) > 1 for name in counts) or "JOB_COMPLETION_INDEX" in env:
        return True
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts
    return "TPU_SKIP_MDS_QUERY" not in env  # jax sets it on a host without a TPU


def _initialize(address: str | None, count: int | None, process: int | None, timeout: int) -> bool:
    """False where jax finds no cluster.

    If the others do not come, jax aborts without a line; so we end the process before that.
    """
    who = "" if process is None else f" as process {process} of {count}"

    def give_up() -> None:
        _exit(
            f"not all processes met at the coordinator {_private_state().coordinator_address} "
            f"within {timeout} s{who}: check that process 0 runs there, that the port is open, and "
            "that every process was started"
        )

    late = threading.Timer(timeout, give_up)
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            process,
            initialization_timeout=timeout + LATER,
            heartbeat_timeout_seconds=flags.FLAGS.lost_after + LATER,
        )
    except (OSError, RuntimeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        if address is None and "coordinator_address should be defined" in line:
            return False
        if address is None and isinstance(error, OSError):  # a TPU host without a metadata server
            logging.getLogger("hybridjax").warning(f"this run is one process: no cluster ({line})")
            return False
        where = _private_state().coordinator_address
        raise UserError(f"cannot join the coordinator {where}{who} ({line})") from error
    finally:
        late.cancel()
    return True


def _private_state():
    """jax has no public way to its key-value store (0.10 to 0.12)."""
    from jax._src import distributed

    return distributed.global_state


# ---------------------------------------------------------------- agreeing


def agree(settings: Mapping[str, Any]) -> None:
    """Compares a tree of settings over all processes.

    Raises:
      UserError: on every process, if any two of them differ.
    """
    everyone = [json.loads(text) for text in _gather(json.dumps(_dotted(settings)))]
    for process, theirs in enumerate(everyone):
        keys = everyone[0].keys() | theirs.keys()
        different = sorted(k for k in keys if everyone[0].get(k) != theirs.get(k))
        if different:
            key = different[0]
            more = f" and {len(different) - 1} more" if different[1:] else ""
            raise UserError(
                f"processes 0 and {process} differ in {key}{more}: {everyone[0].get(key)} and "
                f"{theirs.get(key)}; start all of them with the same command and files"
            )


def _dotted(tree: Mapping[str, Any]) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): repr(leaf) for path, leaf in leaves}


def _gather(text: str) -> list[str]:
    """The text of every process, on every process."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, lengths.max() - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


# ---------------------------------------------------------------- stopping


class StopRequest:
    """Whether to save and end, asked once per step: SIGTERM to any process stops all of them, at
    the same step."""

    def __init__(self):
        self._event = threading.Event()
        if not jax.distributed.is_initialized():  # else jax has a handler
            signal.signal(signal.SIGTERM, lambda *_: self._event.set())

    def at(self, step: int) -> bool:
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._event.is_set()

    def close(self) -> None:
        """SIGTERM ends the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------- noticing


def dispatched(step: int, result: jax.Array) -> None:
    """Says that a step was given to the devices; it is completed once `result` is ready.

    From then on its time counts, so that neither compilation nor evaluation does.
    """
    if _watch:
        _watch.pending.append((step, result, time.monotonic()))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An exception in here ends the other processes too; so does one that one of them caused."""
    try:
        yield
    except (UserError, SystemExit):
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        if _watch:
            _watch.listen()
        fail(f"{str(error).strip().splitlines()[0][:300]}; the same command resumes")
    except BaseException as error:
        if _watch:
            traceback.print_exc()
            fail(type(error).__name__)
        raise
    if _watch:
        _watch.finish()


def fail(line: str) -> NoReturn:
    """Ends this process with an error, and tells the others if there are any."""
    if _watch:
        _watch.end(line)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


class Watch:
    """Two threads: one exchanges signs of life, the other, which waits for no one, judges them."""

    def __init__(self, client, process: int, count: int, lost_after: int, hang_after: int):
        self.pending: collections.deque[tuple[int, jax.Array, float]] = collections.deque()
        self._client, self._process = client, process
        self._lost_after, self._hang_after = lost_after, hang_after
        self._interval = BEAT + PER_PROCESS * count
        self._beat, self._step, self._done, self._fault = 0, 0, False, ""
        now = time.monotonic()
        self._completed = now  # when the last step was
        self._heard = {i: (self._news(), now) for i in range(count)}  # news, and when they came
        self._telling, self._ending = threading.Lock(), threading.Lock()
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def finish(self) -> None:
        self._done = True
        with contextlib.suppress(RuntimeError):  # process 0 may have ended
            self._tell()

    def listen(self) -> None:
        """Time for news of a fault that may have ended a collective; `_judge` ends us with it."""
        time.sleep(2 * self._interval)

    def end(self, line: str) -> NoReturn:
        """Tells the others, prints the line and ends the process, whichever thread is first."""
        if not self._ending.acquire(blocking=False):
            time.sleep(LATER)  # another thread is ending this process
        self._fault = line
        last_words = threading.Thread(target=self._tell, daemon=True)
        last_words.start()
        last_words.join(BEAT)  # not longer: process 0 may be frozen
        if self._process == 0:  # jax aborts the others when this one is gone: let them hear first
            time.sleep(2 * self._interval)
        _exit(f"process {self._process}: {line}")

    def _news(self) -> dict[str, Any]:
        return dict(beat=self._beat, step=self._step, done=self._done, fault=self._fault)

    def _tell(self) -> None:
        with self._telling:
            text = json.dumps(self._news())
            self._client.key_value_set(f"{KEYS}{self._process}", text, allow_overwrite=True)

    def _exchange(self) -> None:
        while not self._done:
            with contextlib.suppress(RuntimeError):  # no answer: `_judge` sees the silence
                self._beat += 1
                self._tell()
                for key, text in self._client.key_value_dir_get(KEYS):
                    process, news = int(key.rpartition("/")[2]), json.loads(text)
                    if news != self._heard[process][0]:
                        self._heard[process] = news, time.monotonic()
            time.sleep(self._interval)

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._done:
            time.sleep(TICK)
            now = time.monotonic()
            if now - last > 10 * TICK:  # this process itself stood still
                self._heard = {i: (news, now) for i, (news, _) in self._heard.items()}
                self._completed = now
            last = now
            while self.pending and self.pending[0][1].is_ready():
                self._step, self._completed = self.pending.popleft()[0], now
            if fault := self._failed() or self._lost(now) or self._hung(now):
                self.end(fault)

    def _failed(self) -> str | None:
        for process, (news, _) in self._heard.items():
            if process != self._process and news["fault"]:
                return f"process {process} has failed ({news['fault']})"
        return None

    def _lost(self, now: float) -> str | None:
        # Our own signs come back from process 0: if they do not, that is the one that is lost.
        for process in (self._process, *self._heard):
            news, when = self._heard[process]
            if now - when > self._lost_after and not news["done"]:
                lost = 0 if process == self._process else process
                return (
                    f"process {lost} has been silent for {now - when:.0f} s, last heard of at step "
                    f"{self._heard[lost][0]['step']}; the same command resumes"
                )
        return None

    def _hung(self, now: float) -> str | None:
        if not self.pending:
            return None
        step, _, since = self.pending[0]
        seconds = now - max(since, self._completed)
        if seconds < self._hang_after:
            return None
        behind = [
            f"{process} (at {news['step']})"
            for process, (news, _) in self._heard.items()
            if news["step"] < step and process != self._process
        ]
        return (
            f"step {step} has not ended for {seconds:.0f} s; not there either: processes "
            f"{', '.join(behind) or 'none'}; the same command resumes"
        )


def _exit(line: str) -> NoReturn:
    """At once: to leave in order, jax would wait for the other processes."""
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)
