"""What fits where, and how fast it could be there: a table of compiled programs, no device needed.

    python -m benchmarks.aot_table                       # every cell that is not done yet
    python -m benchmarks.aot_table --only="9b train"     # those whose name has all these words

Training has 4 M tokens per step, decoding one row. Each cell gets one mesh (and,
where needed, `remat=full`, then more microbatches), chosen by arithmetic before it is compiled in a
process of its own. A cell that is in the results is left alone; `--again` redoes
it. Writes docs/results/aot.json after each cell, and docs/results/aot.md.
"""

import argparse
import dataclasses
import json
import pathlib

import jax

from benchmarks.record import compiled, machine, save
from configs import hypenet
from hybridjax.aot import sweep
from hybridjax.aot.hardware import GiB, chip_of
from hybridjax.aot.measure import Job
from hybridjax.config import UserError, typed

K, M = 2**10, 2**20
TOKENS = 4 * M  # per training step
PRESETS = ("9b", "5b", "2b")
TASKS = {
    "train 16K": ("train", 16 * K),
    "train 64K": ("train", 64 * K),
    "train 512K": ("train", 512 * K),
    "decode 512K": ("decode", 512 * K),
    "decode 1M": ("decode", M),
}
TOPOLOGIES = ("v5p:8x8x16", "v5p:4x4x4", "tpu7x:4x4x4", "v6e:16x16", "v5e:16x16")
MEASURES = ("names", 1), ("full", 1), ("full", 2), ("full", 4), ("full", 8)  # remat, accumulate


@dataclasses.dataclass(frozen=True)
class Cell:
    preset: str
    task: str
    topology: str

    def __str__(self) -> str:
        return f"{self.preset} {self.task} {self.topology}"

    def flags(self) -> list[str]:
        """The command's flags, with the mesh that arithmetic favours.

        Raises:
          UserError: by arithmetic no mesh fits.
        """
        program, length = TASKS[self.task]
        job = Job(program) if program == "train" else Job(program, length, 1)
        target, failure = sweep.on_paper(self.topology), None
        for remat, accumulate in MEASURES if program == "train" else MEASURES[:1]:
            rows = TOKENS // length
            sizes = f"seq_len={length},batch_size={rows},accumulate={accumulate}"
            preset = f"{self.preset},{sizes},model.remat={remat}"
            try:
                found = sweep.estimates(typed(hypenet.get_config(preset)), target, job)
                mesh = sweep.promising(found, target)[0].sizes
            except UserError as error:
                failure = error
                continue
            axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
            flags = [f"--config=configs/hypenet.py:{preset}", f"--topology={self.topology}", *axes]
            more = [f"--program={program}", f"--context={length}"] if program != "train" else []
            return flags + more
        raise failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words that a cell's name must have")
    parser.add_argument("--again", action="store_true", help="cells that are done, too")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per cell")
    parser.add_argument("--output", default="docs/results/aot.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is taken
    output = pathlib.Path(args.output)
    results = json.loads(output.read_text()) if output.exists() else {"cells": {}}

    cells = [Cell(p, t, where) for where in TOPOLOGIES for p in PRESETS for t in TASKS]
    for cell in cells:
        wanted = all(word in str(cell) for word in args.only.split())
        if not wanted or (str(cell) in results["cells"] and not args.again):
            continue
        print(cell, end=": ", flush=True)
        results["cells"][str(cell)] = result = run(cell, args.timeout)
        results["machine"] = machine()
        print(verdict(result), flush=True)
        save(output, json.dumps(results, indent=1) + "\n")
        save(output.with_suffix(".md"), table(results["cells"], cells))


def run(cell: Cell, timeout: float) -> dict:
    """The command's JSON, or what went wrong as `failure`; and the flags, to repeat it."""
    try:
        flags = cell.flags()
    except UserError as error:
        return dict(failure="no mesh fits by arithmetic", reason=str(error))
    return compiled(flags, timeout)


def verdict(result: dict) -> str:
    if "failure" in result:
        return result["failure"]
    return f"{'fits' if result['fits'] else 'does not fit'}, {result['compile_seconds']:.0f} s"


# ---------------------------------------------------------------- the table


def table(results: dict[str, dict], cells: list[Cell]) -> str:
    header = "| cell | mesh | remat, accumulate | GiB per chip | of | ceiling | limit | compiled |"
    lines = [
        "# Compiled ahead of time",
        "",
        "By `python -m benchmarks.aot_table`, with the real compiler and no device. Memory is what "
        "the compiler laid out. The ceiling is a bound from data sheets, with everything "
        "overlapped: nothing here was run. Training: 4 M tokens per step; decoding: one row.",
        "",
        header,
        "|---" * (header.count("|") - 1) + "|",
    ]
    return "\n".join(lines + [_row(c, results[str(c)]) for c in cells if str(c) in results]) + "\n"


def _row(cell: Cell, result: dict) -> str:
    if "failure" in result:
        return (
            f"| {cell} | {_mesh_of_flags(result)} | {_settings(result)} | {result['failure']} |||||"
        )
    per_chip = chip_of(cell.topology).devices
    needed = result["needed"] * per_chip / GiB
    least = "" if result["memory"] else "at least "
    used = f"{least}{needed:.1f}" + ("" if result["fits"] else ", does not fit")
    columns = [
        str(cell), _mesh(result["mesh"]), _settings(result), used,
        f"{result['available'] * per_chip / GiB:.1f}", _ceiling(result),
        result["bound"]["limit"] if result["bound"] else "", f"{result['compile_seconds']:.0f} s",
    ]  # fmt: skip
    return f"| {' | '.join(columns)} |"


def _ceiling(result: dict) -> str:
    if not result["bound"]:
        return ""
    if result["job"]["program"] == "train":
        return f"MFU {result['bound']['mfu']:.0%}"
    return f"{result['tokens'] / result['bound']['seconds']:,.0f} tokens/s"


def _mesh(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1)


def _mesh_of_flags(result: dict) -> str:
    given = [f.removeprefix("--config.mesh.").split("=") for f in result.get("flags", ())
             if f.startswith("--config.mesh.")]  # fmt: skip
    return _mesh({axis: int(n) for axis, n in given})


def _settings(result: dict) -> str:
    if "flags" not in result or any(f.startswith("--program=") for f in result["flags"]):
        return ""
    given = dict(part.split("=") for part in result["flags"][0].split(",")[1:])
    return f"{given['model.remat']}, {given['accumulate']}"


if __name__ == "__main__":
    main()
