import io
import json
import time

import jax
import pytest

from hybridjax import metrics
from hybridjax.config import UserError
from hybridjax.metrics import METRICS_FILE, MetricWriter, Progress, peak_flops, read_metrics


def write_steps(workdir, first, last, resume_step=0, run=0):
    writer = MetricWriter(workdir, resume_step)
    for step in range(first, last + 1):
        writer.write(step, {"loss": 1.0 / step, "run": run})
    writer.close()


def test_lines_are_read_back(tmp_path):
    write_steps(tmp_path, 1, 3)
    assert read_metrics(tmp_path) == [
        {"step": step, "loss": 1.0 / step, "run": 0.0} for step in (1, 2, 3)
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert read_metrics(tmp_path / "elsewhere") == []


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": jax.numpy.float32(2.0)})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    writer.close()


def test_values_that_are_not_finite_are_valid_json(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf")})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}


TAILS = {
    "clean": "",
    "torn": '{"step": 7, "lo',
    "torn just before the newline": '{"step": 5, "loss": 0.2, "run": 0.0}',
    "torn inside a character": '{"step": 6, "note": "é',
    "holes from a crash of the machine": "\0\0\0\0\n",
    "foreign": "3\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_resumed_run_has_each_step_once(tmp_path, tail):
    write_steps(tmp_path, 1, 6, run=0)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(tail.encode()[: len(tail)])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    write_steps(tmp_path, 5, 8, resume_step=4, run=1)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["run"] for line in lines] == [0.0] * 4 + [1.0] * 4
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run/metrics.jsonl"):
        MetricWriter(tmp_path / "file" / "run")


def test_only_process_zero_writes_and_prints(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, 1, 3)
    assert not list(tmp_path.iterdir())
    stream = io.StringIO()
    Progress(10, 100, stream=stream).report(1, loss=1.0)
    assert stream.getvalue() == ""


# ---------------------------------------------------------------- the live line


@pytest.fixture
def clock(monkeypatch):
    """Seconds, advanced by hand."""

    class Clock:
        now = 100.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_speed_is_of_the_last_interval_without_pauses(clock, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e6)
    stream = io.StringIO()
    progress = Progress(100, 1000, start=10, flops_per_token=100.0, stream=stream)
    clock.sleep(5.0)
    with progress.pause():
        clock.sleep(60.0)
    speed = progress.report(20, loss=2.5)
    assert speed["tokens_per_second"] == pytest.approx(10 * 1000 / 5.0)
    assert speed["mfu"] == pytest.approx(2000 * 100 / (1e6 * jax.device_count()))
    assert "step 20/100  loss 2.5000  2k tokens/s  MFU" in stream.getvalue()
    assert stream.getvalue().endswith("0m40s left\n")
    clock.sleep(2.5)  # twice as fast
    assert progress.report(30, loss=2.0)["tokens_per_second"] == pytest.approx(4000.0)


def test_a_pause_counts_out_even_when_it_fails(clock):
    progress = Progress(100, 1000, stream=io.StringIO())
    clock.sleep(1.0)
    with pytest.raises(KeyboardInterrupt), progress.pause():
        clock.sleep(9.0)
        raise KeyboardInterrupt
    assert progress.report(1, loss=1.0)["tokens_per_second"] == pytest.approx(1000.0)


def test_unknown_peak_means_no_utilisation(clock):
    progress = Progress(100, 1000, flops_per_token=100.0, stream=io.StringIO())
    clock.sleep(1.0)
    assert ("mfu" in progress.report(1, loss=1.0)) is (jax.default_backend() != "cpu")


def test_a_terminal_shows_one_line_and_a_file_one_per_report(clock):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(3, 1000, stream=stream)
        for step, loss in ((1, 10000.0), (2, 1.0), (3, 1.0)):
            clock.sleep(1.0)
            progress.report(step, loss)
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("\n")
    shown = terminal.getvalue().rstrip("\n").split("\r")[1:]
    assert len(shown) == 3
    assert len(shown[1]) >= len(shown[0].rstrip())  # nothing of the longer line remains
    assert file.getvalue().count("\n") == 3 and "\r" not in file.getvalue()


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_peak_is_known_for_common_devices(kind, peak):
    assert peak_flops(kind) == peak
