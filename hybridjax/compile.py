"""Compiles a run for hardware that is not at hand, and says what it would cost there.

    python -m hybridjax.compile --config=configs/hypenet.py:9b --topology=v5p:4x4x4 \
        --config.seq_len=65536 --config.batch_size=64 --config.mesh.fsdp=16

The compiler is the real one (libtpu, the `tpu` extra), so what fits here fits there; times are
bounds from data sheets, not measurements. `--program=prefill|decode` compiles a piece of reading or
one step of writing with a state of `--context` tokens (`--chunks=host`: with keys and values of a
memory of chunks in the hosts' memory); `--program=align|distill|finetune` an update of a stage of a
conversion (`--config=configs/halo.py:8b`). `--bill` only lists what each letter of the stack costs,
in seconds and without libtpu. `--sweep` looks for the best mesh. Exit code 1: it does not fit.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from hybridjax import command
from hybridjax.aot import conversion, program, report
from hybridjax.aot.bill import bill
from hybridjax.aot.hardware import EXAMPLES
from hybridjax.aot.measure import Job, measure
from hybridjax.aot.sweep import sweep
from hybridjax.aot.topology import target
from hybridjax.config import Config, UserError, typed
from hybridjax.halo.config import HaloConfig


def main() -> None:
    given = flags.FLAGS
    config, halo = _configs(given.program)
    jax.config.update("jax_enable_compilation_cache", False)  # its programs have devices
    job = _job(given, config)

    if given.bill:
        costs = bill(config.model, job.context or config.seq_len)
        print(f"{config.name} {config.model.layers}")
        _print(report.bill_lines(costs, _sizes(config)))
        _write(given.json, {"length": costs.length, "items": costs.json()})
        return

    if given.topology is None:
        raise UserError(f"no topology: give --topology={EXAMPLES[1]} or --bill")
    devices = target(given.topology, given.slices)
    if given.sweep and halo:
        raise UserError("--sweep knows no stages of a conversion: give --config.mesh.fsdp=N")
    if given.sweep:
        found = sweep(config, devices, job, given.sweep_limit, print)
        _write(given.json, [result.json() for result in found])
        fits = any(result.fits for result in found)
    else:
        result = measure(config, devices, job, halo=halo)
        _print(report.lines(result, config, devices))
        _write(given.json, {"config": config.name, "layers": config.model.layers} | result.json())
        fits = result.fits
    if not fits:
        sys.exit(1)


def _configs(program: str) -> tuple[Config, HaloConfig | None]:
    """The run, and the conversion of which it is a stage."""
    given = command.config()
    if "linear" in given:
        halo = typed(given, HaloConfig)
        return conversion.config_of(halo, program), halo
    if program in conversion.STAGES:
        raise UserError(f"--program={program} is a stage of a conversion: give configs/halo.py:8b")
    return typed(given), None


def _job(given, config: Config) -> Job:
    if given.program in ("prefill", "decode") and given.context is None:
        raise UserError(f"--program={given.program} needs --context=LENGTH: tokens of the state")
    return Job(given.program, given.context or 0, given.rows, given.chunks)


def _sizes(config: Config) -> dict[str, int]:
    return {axis: getattr(config.mesh, axis) for axis in ("fsdp", "tensor", "context")}


def _print(lines) -> None:
    for line in lines:
        print(line)


def _write(path: str | None, values) -> None:
    if path is None:
        return
    try:
        pathlib.Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --json") from error


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is taken
    command.define_config()
    flags.DEFINE_string("topology", None, f"what to compile for: {', '.join(EXAMPLES)}")
    flags.DEFINE_integer("slices", 1, "equal slices; the data axis runs over them")
    flags.DEFINE_enum("program", "train", (*program.NAMES, *conversion.STAGES), "what to compile")
    flags.DEFINE_integer("context", None, "tokens of the decoding state", lower_bound=1)
    flags.DEFINE_integer("rows", 1, "rows that are decoded together", lower_bound=1)
    flags.DEFINE_enum(
        "chunks", "device", ("device", "host"), "where a memory of chunks keeps keys and values"
    )
    flags.DEFINE_bool("bill", False, "only list what each letter costs, at --context or seq_len")
    flags.DEFINE_bool("sweep", False, "look for the best mesh instead of taking config.mesh")
    flags.DEFINE_integer("sweep_limit", 4, "meshes that a sweep compiles", lower_bound=1)
    flags.DEFINE_string("json", None, "write the figures to this file too")
    command.run(main)
