"""The cells of the studies of HALO: conversions that share what they have in common.

All conversions of a seed have one teacher, and those that do not change it one alignment and one
sweep over the layers; these live in the default conversion of the seed, `runs/halo/default-SEED`,
which `studies/halo.py` takes to its end. A cell copies what it shares, goes on where it was
interrupted, and leaves its numbers in `docs/results/STUDY/`; a cell that is there is not run again.
"""

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from hybridjax.files import read_json

CONFIG = "configs/halo.py:tiny"
RUNS = pathlib.Path("runs")
RESULTS = pathlib.Path("docs/results")
SELECTION = "halo_selection"  # the study of every stack with the config as it is
TEACHER = ("teacher",)  # the stage that all conversions of a seed share
ALIGNED = (*TEACHER, "transfer", "align")  # those with one linear mixer


def score(seed: int, name: str = "scores", settings: Sequence[str] = ()) -> dict:
    """The scores of a seed's layers; trains its teacher and aligns its linear mixers.

    Args:
      settings: further ones, which leave the teacher as it is; such scores need a name.
    """
    file = _file(SELECTION, name, seed)
    if not file.exists():
        workdir = _shared(seed)
        if settings:
            workdir = _begun(SELECTION, name, seed, TEACHER)
            _command("search", seed, workdir, *settings)
        _keep(workdir / "select" / "scores.json", file)
    return cell(SELECTION, name, seed)


def convert(
    study: str,
    name: str,
    seed: int,
    stack: str,
    settings: Sequence[str] = (),
    stages: Sequence[str] = ALIGNED,
) -> None:
    """Turns a seed's teacher into `stack`, with further settings of the config.

    Args:
      stages: those that these settings leave as they are.
    """
    file = _file(study, name, seed)
    if file.exists():
        return
    workdir = _begun(study, name, seed, stages)
    _command("distill", seed, workdir, f"select.layers={stack}", *settings)
    _keep(workdir / "halo.json", file)


def cell(study: str, name: str, seed: int) -> dict | None:
    """What a cell has left; None: it was not run."""
    return read_json(_file(study, name, seed))


def exact(result: dict, model: str) -> dict[int, float]:
    """Needle exact match by multiples of the teacher's length."""
    return {c["times"]: c["exact"] for c in result["models"][model]["needle"]}


def stack_of(kept: Sequence[int], depth: int) -> str:
    return "".join("LA"[layer in kept] for layer in range(depth))


def _shared(seed: int) -> pathlib.Path:
    """The default conversion of a seed, as far as its layers' scores."""
    workdir = RUNS / "halo" / f"default-{seed}"
    if "layers" not in (read_json(workdir / "select" / "scores.json") or {}):
        _command("search", seed, workdir)
    return workdir


def _begun(study: str, name: str, seed: int, stages: Sequence[str]) -> pathlib.Path:
    """A cell's directory, with these stages of the default conversion."""
    shared, workdir = _shared(seed), RUNS / study / f"{name}-{seed}"
    for stage in stages:
        if not (workdir / stage).exists():
            shutil.copytree(shared / stage, workdir / f"{stage}.part", dirs_exist_ok=True)
            (workdir / f"{stage}.part").rename(workdir / stage)
    return workdir


def _file(study: str, name: str, seed: int) -> pathlib.Path:
    return RESULTS / study / f"{name}-{seed}.json"


def _command(name: str, seed: int, workdir: pathlib.Path, *settings: str) -> None:
    print(f"== {workdir}", flush=True)
    config = ",".join([CONFIG, f"seed={seed}", *settings])
    line = [sys.executable, "-m", f"hybridjax.{name}", f"--config={config}"]
    subprocess.run([*line, f"--workdir={workdir}"], check=True)


def _keep(path: pathlib.Path, file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, file)
