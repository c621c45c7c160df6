"""Bytes that a device sends per step against the number of devices, at equal tokens per device.

    python -m benchmarks.weak_scaling                 # small layers, v5p:2x2x2 to 16x16x16

The train step is compiled for each slice, with fsdp up to `--fsdp` devices and data over the rest.
Slices that do not compile within `--timeout` are continued by the formula that ring collectives
follow, b (n - 1) / n per mesh axis, fitted to those that did. Compiled points are kept in
docs/results/weak_scaling.json, others tried again. Writes docs/results/weak_scaling.png too.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import jax
import matplotlib
import numpy as np

from benchmarks.record import machine, save

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SLICES = {
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    64: "v5p:4x4x4",
    256: "v5p:4x8x8",
    1024: "v5p:4x16x16",
    4096: "v5p:16x16x16",  # no side of 4 for fsdp: by the formula
}
PRESET = "tiny,optimizer.name=adamw,model.width=512,model.layers=LLLA,model.remat=names"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=PRESET, help="of configs/hypenet.py, with overrides")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="per device")
    parser.add_argument("--fsdp", type=int, default=4, help="devices; data takes the rest")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per slice")
    parser.add_argument("--output", default="docs/results/weak_scaling.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is taken
    output = pathlib.Path(args.output)
    points = json.loads(output.read_text())["points"] if output.exists() else {}

    for devices, topology in SLICES.items():
        if "sent" not in points.get(str(devices), {}):
            points[str(devices)] = compiled(devices, topology, args)
        print(devices, points[str(devices)], flush=True)
        found = {int(n): p["sent"] for n, p in points.items() if "sent" in p}
        fits = fit(found, args.fsdp)
        figures = dict(machine=machine(), preset=args.preset, seq_len=args.seq_len, rows=args.rows,
                       fsdp=args.fsdp, points=points, fit=fits)  # fmt: skip
        save(output, json.dumps(figures, indent=1) + "\n")
    draw(found, fits, args.fsdp, output.with_suffix(".png"))


def compiled(devices: int, topology: str, args) -> dict:
    """Bytes sent per step and device, by the mesh axes crossed; or what went wrong."""
    fsdp = min(args.fsdp, devices)
    sizes = f"seq_len={args.seq_len},batch_size={args.rows * devices}"
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "result.json"
        command = [
            sys.executable, "-m", "hybridjax.compile", f"--topology={topology}", f"--json={path}",
            f"--config=configs/hypenet.py:{args.preset},{sizes}", f"--config.mesh.fsdp={fsdp}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            return dict(failure=f"not compiled within {args.timeout:.0f} s")
        if not path.exists():
            return dict(failure=done.stderr.strip().splitlines()[-1])
        result = json.loads(path.read_text())
    sent = {}
    for c in result["collectives"]:
        axes = "+".join(c["axes"])
        sent[axes] = sent.get(axes, 0.0) + c["sent"]
    return dict(sent=sent, compile_seconds=result["compile_seconds"], needed=result["needed"])


def fit(found: Mapping[int, Mapping[str, float]], fsdp: int) -> dict[str, float]:
    """For each set of axes `b` of b (n - 1) / n, n the devices that a group has.

    By least squares on what was compiled.
    """
    axes = {name for sent in found.values() for name in sent}
    fits = {}
    for name in sorted(axes):
        x = np.array([ring(name, devices, fsdp) for devices in found])
        y = np.array([sent.get(name, 0.0) for sent in found.values()])
        fits[name] = float(x @ y / max(x @ x, 1e-12))
    return fits


def ring(axes: str, devices: int, fsdp: int) -> float:
    """(n - 1) / n for the groups of these axes."""
    fsdp = min(fsdp, devices)
    sizes = {"fsdp": fsdp, "data": devices // fsdp}
    n = int(np.prod([sizes.get(axis, 1) for axis in axes.split("+")]))
    return (n - 1) / n


def draw(found, fits: Mapping[str, float], fsdp: int, path: pathlib.Path) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    devices = np.array(sorted(SLICES))
    total = lambda n: sum(b * ring(name, n, fsdp) for name, b in fits.items())
    for name, b in fits.items():
        measured = sorted((n, sent[name]) for n, sent in found.items() if name in sent)
        line = axis.plot(devices, [b * ring(name, n, fsdp) / 1e6 for n in devices], "--", lw=1)
        axis.plot(*np.array([(n, y / 1e6) for n, y in measured]).T, "o", label=name,
                  color=line[0].get_color())  # fmt: skip
    axis.plot(devices, [total(n) / 1e6 for n in devices], "k-", lw=1.5, label="sum, by the formula")
    axis.set(
        xscale="log", xticks=devices, xlabel="devices (TPU v5p)", ylim=(0, None),
        ylabel="MB sent per step and device",
        title="Weak scaling: points compiled, dashed b (n - 1) / n",
    )  # fmt: skip
    axis.set_xticks(devices, map(str, devices))
    axis.minorticks_off()
    axis.legend(frameon=False, title="mesh axes crossed")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
