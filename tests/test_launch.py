"""launch/: what each script would run, word for word; what it does, with the cloud's tools faked.

The golden texts are in tests/launch/. Nothing here reaches a network or an accelerator.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GOLDEN = pathlib.Path(__file__).parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])

TRAIN = ["python", "-m", "hybridjax.train", "--config=configs/hypenet.py:500m"]
COMMAND = ["--", *TRAIN, "--workdir=/mnt/bucket/runs/500m"]
HARD = ['--config.name=it\'s "a" $HOME `x` \\n', "--path=a  b/*.parquet", "", "two\nlines"]

PLACE = ["--project=P", "--zone=Z", "--name=N"]
SLICE = [*PLACE, "--type=v6e-16", "--runtime=v2-alpha-tpuv6e"]
GKE = [*PLACE, "--cluster=C"]
SLURM = ["--nodes=2", "--gpus=8", "--time=24:00:00", "--name=N"]
SKY = ["--infra=gcp", "--accelerators=tpu-v6e-8", "--name=N", "--bucket=gs://B"]

RUNS = {
    "tpu_vm-create": ["tpu_vm.sh", "create", *SLICE],
    "tpu_vm-create-spot": ["tpu_vm.sh", "create", *SLICE, "--spot"],
    "tpu_vm-create-queued": ["tpu_vm.sh", "create", *SLICE, "--queued", "--reserved"],
    "tpu_vm-sync": ["tpu_vm.sh", "sync", *PLACE],
    "tpu_vm-sync-bucket": ["tpu_vm.sh", "sync", *PLACE, "--bucket=B"],
    "tpu_vm-run": ["tpu_vm.sh", "run", *PLACE, *COMMAND],
    "tpu_vm-run-xla": ["tpu_vm.sh", "run", *PLACE, "--xla=overlap-tpu,vmem-tpu", *COMMAND],
    "tpu_vm-stop": ["tpu_vm.sh", "stop", *PLACE],
    "tpu_vm-delete": ["tpu_vm.sh", "delete", *PLACE],
    "tpu_vm-babysit": ["tpu_vm.sh", "babysit", *SLICE, "--spot", "--queued", *COMMAND],
    "gke_xpk-tpu": ["gke_xpk.sh", *GKE, "--tpu-type=v6e-16", "--slices=2", "--image=I", *COMMAND],
    "gke_xpk-gpu": [
        *["gke_xpk.sh", *GKE, "--device-type=h100-mega-80gb-8", "--nodes=2", "--base-image=I"],
        *["--storage=S", "--spot", "--max-restarts=5", "--xla=overlap-gpu", *COMMAND],
    ],
    "gke_xpk-reserved": [
        *["gke_xpk.sh", *GKE, "--tpu-type=v6e-16", "--image=I", "--reservation=R"],
        *["--xla=slices-tpu", *COMMAND],
    ],
    "slurm": ["slurm.sh", *SLURM, *COMMAND],
    "slurm-options": [
        *["slurm.sh", *SLURM, "--cpus=4", "--partition=Q", "--account=A", "--xla=overlap-gpu"],
        *COMMAND,
    ],
    "skypilot": ["skypilot.sh", *SKY, *COMMAND],
    "skypilot-gpu": [
        *["skypilot.sh", *SKY, "--accelerators=H100:8", "--on-demand", "--xla=overlap-gpu"],
        *COMMAND,
    ],
    "hard-words": ["slurm.sh", *SLURM, *COMMAND, *HARD],
}

NO_RUN = {
    "no-action": (["tpu_vm.sh"], "no action '': give one of create, sync"),
    "no-project": (["tpu_vm.sh", "create", *SLICE[1:]], "no project: give --project=VALUE or set"),
    "no-type": (["tpu_vm.sh", "create", *PLACE], "no type: give --type=VALUE"),
    "no-command": (["tpu_vm.sh", "run", *PLACE], "no command: give -- python -m hybridjax.train"),
    "no-workdir": (["tpu_vm.sh", "run", *PLACE, "--", *TRAIN], "no --workdir=DIR in the command"),
    "bucket-as-workdir": (
        ["tpu_vm.sh", "run", *PLACE, "--", *TRAIN, "--workdir=gs://B/run"],
        "--workdir=gs://B/run is a URL: mount the bucket",
    ),
    "two-tiers": (["tpu_vm.sh", "create", *SLICE, "--spot", "--reserved"], "exclude each other"),
    "no-cluster": (["gke_xpk.sh", *PLACE, *COMMAND], "no cluster: give --cluster=VALUE"),
    "no-device": (["gke_xpk.sh", *GKE, *COMMAND], "no tpu-type and no device-type: give"),
    "two-devices": (
        ["gke_xpk.sh", *GKE, "--tpu-type=v6e-16", "--device-type=b200-8", *COMMAND],
        "--tpu-type and --device-type exclude each other",
    ),
    "no-image": (["gke_xpk.sh", *GKE, "--tpu-type=v6e-16", *COMMAND], "no image and no base-image"),
    "quotes-for-xpk": (
        ["gke_xpk.sh", *GKE, "--device-type=b200-8", "--image=I", *COMMAND, "--config.name=it's"],
        "xpk cannot carry quotes and backslashes to GPU hosts",
    ),
    "no-nodes": (["slurm.sh", *SLURM[1:], *COMMAND], "no nodes: give --nodes=VALUE"),
    "no-bucket": (["skypilot.sh", *SKY[:-1], *COMMAND], "no bucket: give --bucket=VALUE"),
    "unknown-option": (["slurm.sh", *SLURM, "--gpu=8", *COMMAND], "unknown option --gpu: give one"),
    "unknown-switch": (["slurm.sh", *SLURM, "--spot", *COMMAND], "unknown switch --spot"),
    "no-value": (["slurm.sh", "--nodes", *COMMAND], "--nodes has no value: give --nodes=VALUE"),
    "no-dashes": (["slurm.sh", *SLURM, *TRAIN], "unexpected argument 'python'"),
    "unknown-xla": (["slurm.sh", *SLURM, "--xla=fast", *COMMAND], "no flag set 'fast': there are"),
}


def launch(script, *args, path="", cwd=ROOT, **env):
    """The finished script; of the environment it sees only `env` and the usual commands."""
    path = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env={"PATH": path, "TMPDIR": "/tmp", **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake(directory, name, text, interpreter="/usr/bin/env bash"):
    """A command `name` in `directory`, which is put before the others in PATH."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!{interpreter}\n{text}")
    (directory / name).chmod(0o755)


# ---------------------------------------------------------------- what they would run


@pytest.mark.parametrize("name", RUNS)
def test_dry_run_prints_what_it_would_run(name):
    script, *args = RUNS[name]
    at = args.index("--") if "--" in args else len(args)
    done = launch(script, *args[:at], "--dry-run", *args[at:])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


def test_there_is_no_golden_text_without_its_run():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(RUNS)


@pytest.mark.parametrize("args, fault", NO_RUN.values(), ids=NO_RUN)
def test_a_fault_is_one_line(args, fault):
    done = launch(*args)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {fault}") or fault in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_come_from_the_environment_too():
    env = {"HYBRIDJAX_PROJECT": "P", "HYBRIDJAX_ZONE": "Z", "HYBRIDJAX_NAME": "other"}
    done = launch("tpu_vm.sh", "delete", "--name=N", "--dry-run", **env)
    assert done.stdout == (GOLDEN / "tpu_vm-delete.txt").read_text()


# ---------------------------------------------------------------- what the hosts then run

FIND = "for word; do [[ $word != {0}=* ]] || found=${{word#{0}=}}; done;"
ARGV = "import json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def through_tpu_vm(tmp, command):
    """As ssh does it: the worker's login shell reads the line, in the home directory."""
    fake(tmp / "bin", "gcloud", f'{FIND.format("--command")} cd {tmp}; bash -c "$found"')
    (tmp / "hybridjax").symlink_to(ROOT)
    (tmp / "venv").mkdir()
    (tmp / "venv" / "bin").symlink_to(tmp / "bin")
    return launch("tpu_vm.sh", "run", *PLACE, "--", *command, path=tmp / "bin", HOME=str(tmp))


def through_xpk(tmp, command):
    """As xpk does it: in parentheses in a shell script of the pod."""
    fake(tmp / "bin", "xpk", f'{FIND.format("--command")} bash -c "($found) & wait \\$!"')
    args = [*GKE, "--tpu-type=v6e-16", "--image=I", "--", *command]
    return launch("gke_xpk.sh", *args, path=tmp / "bin")


def through_slurm(tmp, command):
    fake(tmp / "bin", "sbatch", 'while [[ $1 == --* ]]; do shift; done\nexec bash "$@"')
    fake(tmp / "bin", "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    args = [*SLURM, "--", *command]
    return launch("slurm.sh", *args, path=tmp / "bin", SLURM_CPUS_PER_TASK="8", SLURM_JOB_ID="7")


def through_skypilot(tmp, command):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task["envs"]) == {"BUCKET", "EXTRA", "COMMAND"}
    (tmp / "run.sh").write_text(task["run"])
    fake(tmp / "bin", "sky", f"{FIND.format('--env=COMMAND')} COMMAND=$found bash {tmp}/run.sh")
    (tmp / "venv").mkdir()
    (tmp / "venv" / "bin").symlink_to(tmp / "bin")
    return launch("skypilot.sh", *SKY, "--", *command, path=tmp / "bin", HOME=str(tmp))


@pytest.mark.parametrize("through", [through_tpu_vm, through_xpk, through_slurm, through_skypilot])
def test_the_words_of_the_command_arrive_unchanged(through, tmp_path):
    fake(tmp_path / "bin", "python", ARGV, interpreter=sys.executable)
    command = [*COMMAND[1:], *HARD]
    done = through(tmp_path, command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == command[1:]


# ---------------------------------------------------------------- worker.sh

STOPS = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\n"


@pytest.mark.parametrize(
    "code, signals, expected",
    [
        (0, [signal.SIGTERM], 143),
        (0, [signal.SIGHUP, signal.SIGTERM], 143),
        (1, [signal.SIGTERM], 1),
    ],
    ids=["saved", "saved, hung up", "could not save"],
)
def test_worker_says_that_it_was_stopped(code, signals, expected):
    program = STOPS.format(code=code) + "print('ready', flush=True)\ntime.sleep(50)"
    command = ["bash", LAUNCH / "worker.sh", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "ready\n"
        for number in signals:
            worker.send_signal(number)
            time.sleep(0.2)
        assert worker.wait(timeout=20) == expected


@pytest.mark.parametrize("code", [0, 1, 134])
def test_worker_passes_on_the_code_of_its_command(code):
    assert launch("worker.sh", "bash", "-c", f"exit {code}").returncode == code


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("code, requeued", [(0, ""), (1, ""), (143, "requeue 7\n")])
def test_a_stopped_slurm_job_queues_again(tmp_path, code, requeued):
    fake(tmp_path, "srun", f"exit {code}")
    fake(tmp_path, "scontrol", 'echo "$@"')
    env = dict(SLURM_CPUS_PER_TASK="8", SLURM_JOB_ID="7")
    done = launch("slurm.sbatch", "python", path=tmp_path, **env)
    assert done.returncode == code and done.stdout == requeued


GCLOUD = """
home=$(dirname "$0")
case "$*" in
  *describe*) cat "$home/state" 2>/dev/null ;;
  *" create "*) echo create >>"$home/log"; echo READY >"$home/state" ;;
  *" delete "*) echo delete >>"$home/log"; rm -f "$home/state" ;;
  *pkill*) echo stop >>"$home/log" ;;
  *setup.sh*) echo install >>"$home/log" ;;
  *worker.sh*)
    echo run >>"$home/log"
    read -r code state <"$home/runs"
    sed -i 1d "$home/runs"
    echo "$state" >"$home/state"
    exit "$code" ;;
esac
"""


@pytest.mark.parametrize(
    "runs, code, log",
    [
        (["0 READY"], 0, "delete create install run"),
        (
            ["255 PREEMPTED", "143 PREEMPTED", "0 READY"],
            0,
            "delete create install run delete create install run delete create install run",
        ),
        (["1 READY", "0 READY"], 0, "delete create install run stop install run"),
        (["1 READY"] * 2, 1, "delete create install run stop install run"),
    ],
    ids=["finishes", "is preempted twice", "fails once", "fails for good"],
)
def test_babysit(tmp_path, runs, code, log):
    fake(tmp_path, "gcloud", GCLOUD)
    fake(tmp_path, "sleep", "")
    fake(tmp_path, "git", "")
    (tmp_path / "runs").write_text("\n".join(runs) + "\n")
    done = launch("tpu_vm.sh", "babysit", *SLICE, "--retries=1", *COMMAND, path=tmp_path)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "log").read_text().split() == log.split()


# ---------------------------------------------------------------- the files themselves


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert len(script.read_text().splitlines()) < 120
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    if (shellcheck := shutil.which("shellcheck", path=path)) is None:
        pytest.skip("needs shellcheck, of the test extra")
    command = [shellcheck, "--external-sources", "--source-path=launch", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


PERSONAL = {
    "an e-mail address": r"[\w.+-]+@[\w-]+\.[a-z]{2,}",
    "a key": r"AIza|gh[pousr]_\w|hf_[A-Za-z]{8}|sk-\w{8}|AKIA|BEGIN [A-Z ]*PRIVATE KEY",
    "a token with a value": r"(?i)(token|secret|password|api_?key)\w*=['\"]?\w",
    "a project, zone or account": r"--(project|zone|account)=(?![A-Z]\b|\"?\$|VALUE)",
    "a bucket": r"gs://(?!B\b|\*|\$|BUCKET)\w",
    "a default": r"opt\[(project|zone|account|cluster|infra|bucket|name)\]:[-=]",
    "a home directory": r"/(home|Users)/\w",
}


@pytest.mark.parametrize("what", PERSONAL)
def test_nothing_personal(what):
    for path in sorted(LAUNCH.iterdir()):
        found = re.search(PERSONAL[what], path.read_text())
        assert not found, f"{path.name} has {what}: {found[0]}"


def flag_sets() -> dict[str, list[str]]:
    text = (LAUNCH / "xla_flags.sh").read_text()
    sets = re.findall(r"^    ([a-z]+-[a-z]+)\)\n(.*?);;", text, flags=re.M | re.S)
    return {name: re.findall(r"^ +(--\S+)", body, flags=re.M) for name, body in sets}


def test_xla_knows_the_gpu_flags():
    flags = [flag for name, flags in flag_sets().items() if name.endswith("gpu") for flag in flags]
    assert flags
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.slow
def test_libtpu_knows_the_tpu_flags():
    libtpu = pytest.importorskip("libtpu")
    library = (pathlib.Path(libtpu.__file__).parent / "libtpu.so").read_bytes()
    flags = [flag for name, flags in flag_sets().items() if name.endswith("tpu") for flag in flags]
    assert flags
    for flag in flags:
        assert flag.removeprefix("--").partition("=")[0].encode() + b"\0" in library, flag
