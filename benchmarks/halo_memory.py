"""The memory of converting Qwen3-8B by HALO, stage by stage: bytes of one device.

    python -m benchmarks.halo_memory             # every cell that is not done yet; needs libtpu

For a TPU each stage is compiled by the real compiler (`hybridjax.compile --program=align`, in a
process of its own), for a host of 8 GPUs of 80 GB it is arithmetic: what a step has as arguments
from their shapes and places, the rest by the formulas with which `--sweep` chooses meshes, which
are given for the TPU's mesh too, as a check. Nothing is run. Writes docs/results/halo_memory.json
after each cell, and docs/results/halo_memory.md.
"""

import argparse
import json
import pathlib

import jax

from benchmarks.record import compiled, machine, save
from configs import halo as configs
from hybridjax.aot import conversion, sweep
from hybridjax.aot.bill import bill
from hybridjax.aot.hardware import GiB, chip_of
from hybridjax.aot.topology import target
from hybridjax.config import MeshConfig, typed
from hybridjax.halo.config import HaloConfig

PRESET = "8b"
POD = "v5p:4x4x4"
HOST, HOST_MEMORY = "8 GPUs of 80 GB", 80e9
# The published 8 rows at once do not divide over 16 devices: half the microbatches.
POD_CHANGES = {"finetune": ("finetune.accumulate=8",)}
MESHES = {
    POD: MeshConfig(data=1, fsdp=16, tensor=4),
    HOST: MeshConfig(data=1, fsdp=8),
    f"{HOST}, weights not divided": MeshConfig(data=8),
}
LOGITS = 2  # times those of a training step, where a teacher has logits too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="cells that are done, too")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds per cell")
    parser.add_argument("--output", default="docs/results/halo_memory.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is taken
    output = pathlib.Path(args.output)
    results = json.loads(output.read_text()) if output.exists() else {"cells": {}}

    for where, mesh in MESHES.items():
        for stage in conversion.STAGES:
            name = f"{stage}, {where}"
            found = results["cells"].get(name, {})
            if found and "failure" not in found and not args.again:
                continue
            print(name, end=": ", flush=True)
            changes = POD_CHANGES.get(stage, ()) if where == POD else ()
            cell = dict(stage=stage, where=where, settings=changes)
            cell["arithmetic"] = arithmetic(stage, mesh, changes)
            if where == POD:
                cell |= compiled(flags_of(stage, mesh, changes), args.timeout)
            results["cells"][name], results["machine"] = cell, machine()
            print(cell.get("failure") or f"{total(cell) / GiB:.1f} GiB", flush=True)
            save(output, json.dumps(results, indent=1) + "\n")
            save(output.with_suffix(".md"), table(results["cells"]))


def arithmetic(stage: str, mesh: MeshConfig, changes: tuple[str, ...]) -> dict[str, float]:
    """Bytes of one device by what they are."""
    preset = ",".join([PRESET, *changes])
    halo = typed(configs.get_config(preset), HaloConfig)
    config = conversion.config_of(halo, stage)
    devices = target(f"cpu:{mesh.data * mesh.fsdp * mesh.tensor}").mesh(mesh)
    parts = dict(conversion.trace(halo, devices, stage).bytes())
    parts["gradients"] = parts["parameters"]
    found = sweep.activations(config, bill(config.model, config.seq_len), mesh)
    if stage == "align":  # one layer at a time, and no next token
        del found["kept for the backward pass"], found["logits"]
    if stage == "distill":
        found["logits"] *= LOGITS
    return parts | found


def flags_of(stage: str, mesh: MeshConfig, changes: tuple[str, ...]) -> list[str]:
    """Those of `hybridjax.compile`."""
    axes = [f"--config.mesh.{axis}={size}" for axis, size in vars(mesh).items()]
    return [
        f"--config=configs/halo.py:{','.join([PRESET, *changes])}", f"--program={stage}",
        f"--topology={POD}", *axes,
    ]  # fmt: skip


# ---------------------------------------------------------------- the table


def total(cell: dict) -> float:
    """Bytes of one device: as compiled, or else by arithmetic."""
    return cell.get("needed") or sum(cell["arithmetic"].values())


def room_of(cell: dict) -> float:
    return chip_of(POD).hbm if cell["where"] == POD else HOST_MEMORY


def table(cells: dict[str, dict]) -> str:
    parts = list(dict.fromkeys(part for c in cells.values() for part in c["arithmetic"]))
    header = ["stage, where", *parts, "sum", "compiled", "of", ""]
    lines = [
        "# The memory of a conversion of Qwen3-8B",
        "",
        "By `python -m benchmarks.halo_memory`: GiB of one device in a step of each stage. Columns "
        "up to `sum` are arithmetic; `compiled` is what the real compiler laid out. Nothing was "
        "run. Parameters, moments and gradients are f32, activations bf16; nine of 36 layers stay "
        f"attention. Meshes: {'; '.join(f'{w}: {_mesh(m)}' for w, m in MESHES.items())}.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for name, cell in cells.items():
        sizes = [f"{cell['arithmetic'].get(part, 0) / GiB:.2f}" for part in parts]
        sizes.append(f"{sum(cell['arithmetic'].values()) / GiB:.1f}")
        room = room_of(cell)
        laid_out = f"{cell['needed'] / GiB:.1f}" if "needed" in cell else cell.get("failure", "")
        verdict = "fits" if total(cell) <= room else "**does not fit**"
        if "failure" in cell:
            verdict += ", by arithmetic"
        lines.append(
            f"| {name} | {' | '.join(sizes)} | {laid_out} | {room / GiB:.1f} | {verdict} |"
        )
    return "\n".join([*lines, "", *advice(cells)]) + "\n"


def advice(cells: dict[str, dict]) -> list[str]:
    """What to change where it does not fit, and what was changed so that it does."""
    lines = []
    for name, cell in cells.items():
        if cell["settings"]:
            lines.append(f"- {name}: with {', '.join(cell['settings'])}.")
        if (room := room_of(cell)) < total(cell):
            state = sum(
                cell["arithmetic"].get(part, 0)
                for part in ("parameters", "optimizer", "gradients", "teacher")
            )
            lines.append(
                f"- {name}: {state / GiB:.0f} of {room / GiB:.0f} GiB are weights, moments and "
                "gradients, which fsdp=8 divides by 8."
            )
        lines += [f"- {name}: {c['what']} saves {c['saves'] / GiB:.1f} GiB." for c in
                  cell.get("changes", ())]  # fmt: skip
    return lines


def _mesh(mesh: MeshConfig) -> str:
    return " ".join(f"{axis} {size}" for axis, size in vars(mesh).items() if size > 1)


if __name__ == "__main__":
    main()
