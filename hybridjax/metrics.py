"""What a run reports: `metrics.jsonl`, TensorBoard, and the live line on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from hybridjax.config import UserError

METRICS_FILE = "metrics.jsonl"

# Dense bf16 FLOP/s of one JAX device, by a part of its `device_kind`; the first that fits counts.
# TPU: cloud.google.com/tpu/docs/system-architecture-tpu-vm, per chip; a device of v2 and v3 is half
# a chip. GPU: NVIDIA's data sheets, without sparsity.
_PEAK_FLOPS = {
    "TPU7x": 2307e12 / 2,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12 / 2,
    "TPU v2": 45e12 / 2,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
}


class MetricWriter:
    """Appends scalars to `metrics.jsonl` (one object a line) and to TensorBoard; process 0 only."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        """`resume_step`: the steps done so far; what was written of later ones is dropped."""
        self._file = self._tensorboard = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / METRICS_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
            # TensorBoard itself hides events from `purge_step` on.
            self._tensorboard = SummaryWriter(
                str(path.parent / "tensorboard"), purge_step=resume_step + 1
            )
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record the scalars after `step` steps."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        line = {"step": int(step)} | {name: _json_number(v) for name, v in values.items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._file.name, error) from error
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a torn one is left out."""
    path = Path(workdir) / METRICS_FILE
    return [json.loads(line) for line in _whole_lines(path)]


def _unwritable(path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; make room or choose another workdir")


def _json_number(value: float) -> float | str:
    """JSON has no NaN or infinity; they become "nan", "inf", "-inf", which `float()` reads."""
    return value if math.isfinite(value) else str(value)


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`. The file is replaced in one move."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # What follows the last newline is a write that was cut off.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [line for line in lines if _is_record(line)]


def _is_record(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except (json.JSONDecodeError, TypeError):
        return False


class Progress:
    """The live line: step, loss, tokens/s, model FLOP utilisation (MFU) where known, time left.

    A terminal shows one line that is rewritten; a log file gets a line at each report.
    """

    def __init__(
        self,
        steps: int,
        tokens_per_step: int,
        start: int = 0,
        flops_per_token: float | None = None,
        stream=None,
    ):
        """`start`: the steps done so far; `flops_per_token`: forward and backward, all devices."""
        self._steps, self._tokens_per_step = steps, tokens_per_step
        peak = peak_flops(jax.devices()[0].device_kind)
        known = flops_per_token and peak
        self._utilisation = flops_per_token / (peak * jax.device_count()) if known else None
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._enabled = jax.process_index() == 0
        self._width = 0
        self._mark(start)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (evaluation, checkpoints) does not count as training time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - before

    def report(self, step: int, loss: float) -> dict[str, float]:
        """Print the line for `step`; return the speed since the last report, for the metrics."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        tokens_per_second = (step - self._step) * self._tokens_per_step / elapsed
        speed = {"tokens_per_second": tokens_per_second}
        text = f"step {step}/{self._steps}  loss {loss:.4f}  {_short(tokens_per_second)} tokens/s"
        if self._utilisation is not None:
            speed["mfu"] = tokens_per_second * self._utilisation
            text += f"  MFU {speed['mfu']:.1%}"
        if tokens_per_second:
            left = (self._steps - step) * self._tokens_per_step / tokens_per_second
            text += f"  {_duration(left)} left"
        self._print(text, last=step >= self._steps)
        self._mark(step)
        return speed

    def note(self, text: str) -> None:
        """Print a line of its own, without spoiling the live one."""
        self._print(text, last=True)

    def _mark(self, step: int) -> None:
        self._step, self._since = step, time.perf_counter()

    def _print(self, text: str, last: bool) -> None:
        if not self._enabled:
            return
        if self._live:
            padded = text.ljust(self._width)  # covers the rest of a longer line
            self._width = 0 if last else len(text)
            print(f"\r{padded}", end="\n" if last else "", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)


def peak_flops(device_kind: str) -> float | None:
    """The peak dense bf16 FLOP/s of a device, None where unknown."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_kind), None)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
