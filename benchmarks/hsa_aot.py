"""HSA's 345M at both of its ends, compiled for 16 TPU v5e chips that need not be there.

    python -m benchmarks.hsa_aot                    # what is not done yet; minutes each
    python -m benchmarks.hsa_aot --only=decode

Trained on 16 rows of 32K tokens, and writing after 32M tokens, one row whose keys and values are in
the hosts' memory. Writes docs/results/hsa_aot.json after each, and docs/results/hsa_aot.md.
"""

import argparse
import json
import pathlib

import jax

from benchmarks.aot_table import verdict
from benchmarks.record import compiled, machine, save
from hybridjax.aot.hardware import GiB

TOPOLOGY = "v5e:4x4"
CELLS = {
    "train 32K": [
        "--config=configs/hsa.py:345m,seq_len=32768,batch_size=16",
        "--config.mesh.data=1", "--config.mesh.fsdp=16",
    ],
    "decode 32M": [
        "--config=configs/hsa.py:345m", "--program=decode", "--context=33554432",
        "--chunks=host", "--config.mesh.data=1", "--config.mesh.context=16",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of a cell's name")
    parser.add_argument("--again", action="store_true", help="cells that are done, too")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds per cell")
    parser.add_argument("--output", default="docs/results/hsa_aot.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is taken
    output = pathlib.Path(args.output)
    results = json.loads(output.read_text()) if output.exists() else {"cells": {}}
    for name, flags in CELLS.items():
        if args.only in name and (name not in results["cells"] or args.again):
            print(name, end=": ", flush=True)
            result = compiled([*flags, f"--topology={TOPOLOGY}"], args.timeout)
            print(verdict(result), flush=True)
            results["cells"][name], results["machine"] = result, machine()
            save(output, json.dumps(results, indent=1) + "\n")
            save(output.with_suffix(".md"), table(results["cells"]))


def table(cells: dict[str, dict]) -> str:
    """A column per cell; bytes are those of one chip."""
    done = {name: cells[name] for name in CELLS if name in cells and "failure" not in cells[name]}
    lines = [
        "# HSA's 345M, compiled ahead of time",
        "",
        f"By `python -m benchmarks.hsa_aot`, for {TOPOLOGY}, with the real compiler and no device. "
        "MiB per chip; bounds are from data sheets, without transfers between host and chip: "
        "nothing here was run.",
        "",
        f"| | {' | '.join(done)} |",
        "|---" * (len(done) + 1) + "|",
    ]
    columns = [_column(result) for result in done.values()]
    rows = dict.fromkeys(key for column in columns for key in column)
    lines += [f"| {key} | {' | '.join(c.get(key, '') for c in columns)} |" for key in rows]
    lines += [f"\n{name}: {c['failure']}" for name, c in cells.items() if "failure" in c]
    return "\n".join(lines) + "\n"


def _column(result: dict) -> dict[str, str]:
    mib = lambda size: f"{size / 2**20:,.0f}"
    mesh = " ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1)
    column = {"mesh": mesh, **{part: mib(size) for part, size in result["parts"].items()}}
    if memory := result["memory"]:
        column |= {"temporaries": mib(memory["temporaries"]), "program": mib(memory["code"])}
    column["in all, of HBM"] = (
        f"{mib(result['needed'])} of {mib(result['available'])}"
        + (", fits" if result["fits"] else ", does not fit")
    )
    if not result["fits"]:
        column["largest buffers"] = "; ".join(result["largest"])
        return column
    bound, sent = result["bound"], sum(c["sent"] for c in result["collectives"])
    rate = result["tokens"] / bound["seconds"]
    column |= {
        "HBM traffic, GiB": f"{result['hbm_bytes'] / GiB:.2f}",
        "sent, MiB": f"{sent / 2**20:,.2f}",
        "limit": bound["limit"],
        "ceiling": f"{rate:,.0f} tokens/s"
        + (f", MFU {bound['mfu']:.0%}" if result["job"]["program"] == "train" else ""),
        "compiled": f"{result['compile_seconds']:.0f} s",
    }
    return column


if __name__ == "__main__":
    main()
