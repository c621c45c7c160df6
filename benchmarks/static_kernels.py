"""What the TPU compiler makes of our kernels, without a TPU: cycles, spills, use of units.

    python -m benchmarks.static_kernels --output docs/results/static_kernels

compiles each kernel ahead of time for each chip with libtpu, reads the schedules that libtpu dumps
and writes OUTPUT.json and a table, OUTPUT.md. The figures are static: every body of a `pl.when`
counts as taken, and waits for HBM are not timed. So compare kernels with each other. The cycles of
the XLA form are the compiler's estimates, which include HBM time, summed over its fusions.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import tempfile
from pathlib import Path

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["DUMP"] = tempfile.mkdtemp(prefix="static_kernels_")
os.environ["LIBTPU_INIT_ARGS"] = (
    "--xla_mosaic_dump_to={0} --xla_jf_dump_to={0} --xla_jf_dump_llo_text=true"
).format(os.environ["DUMP"])

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import gated_delta_rule, linear_attention
from pallas_kernels.gated_delta_rule import tpu_kernels as delta_rule_kernels
from pallas_kernels.linear_attention import tpu_kernels
from pallas_kernels.linear_attention.decay import alibi_slopes

_DUMP = Path(os.environ["DUMP"])

# Name: topology, HBM bytes per second and clock per core (peak FLOPs / FLOPs per cycle; v6e's is
# taken to be v5p's). None: not published.
CHIPS = {
    "v5e": ("v5e:2x2", 819e9, 1.50e9),
    "v5p": ("v5p:2x2x1", 2765e9 / 2, 1.75e9),
    "v6e": ("v6e:2x2", 1640e9, 1.75e9),
    "tpu7x": ("tpu7x:2x2x1", 7380e9 / 2, None),
}
H, K, V = 8, 128, 128
KEYS = 4  # heads of the delta rule's queries and keys, half of the values' as in Qwen3-Next
TILES = {
    "linear_attention": [(128, 1, 1), (128, 1, 4), (128, 4, 4), (256, 2, 4)],
    "gated_delta_rule": [(128, 1, 4), (128, 2, 4), (64, 4, 4)],
}
USED = dict(linear_attention=(128, 4, 4), gated_delta_rule=(128, 2, 4))  # by `tpu.py`
KINDS = {
    "constant": dict(token_decay=False, packed=False),
    "packed": dict(token_decay=False, packed=True),
    "token, packed": dict(token_decay=True, packed=True),
}
DECAYS = dict(linear_attention=list(KINDS), gated_delta_rule=["token, packed"])
# Arrays of H heads that are read and written: q, k, v, o, or those and their gradients.
MOVED = {
    "linear_attention": dict(forward=4, backward=7),
    "gated_delta_rule": dict(forward=3, backward=5),  # of q and k, half as many heads
}
UNITS = {"MXU": "matrix unit", "XLU": "transposes", "VECTOR_ALU": "vector ALU",
         "VECTOR_LOAD": "loads", "VECTOR_STORE": "stores", "VECTOR_EUP": "exponentials"}


def compile_for(chip: str, f, *args):
    """`f` compiled for one device of the chip; args are shapes. Leaves its schedules in _DUMP."""
    for file in _DUMP.iterdir():
        file.unlink()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0])
    sharding = SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(f).trace(*args).lower().compile()


def linear_attention_arguments(plan: tpu_kernels.Plan, backward: bool):
    T = 4 * plan.block
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    rows = array(1, T // plan.chunk, H // plan.heads, plan.rows, plan.chunk)
    intra = None if plan.token_decay else array(H, plan.chunk, plan.chunk)
    q, v = (array(1, T, H * width, dtype=jnp.bfloat16) for width in (K, V))
    state, states = array(1, H, K, V), array(1, T // plan.block, H, K, V)
    if backward:
        return q, q, v, v, state, states, (rows, intra)
    return q, q, v, state, (rows, intra)


def delta_rule_arguments(plan: delta_rule_kernels.Plan, backward: bool):
    T = 4 * plan.block
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    rows = array(1, T // plan.chunk, H // plan.heads, plan.rows, plan.chunk)
    k, v = (array(1, T, size, dtype=jnp.bfloat16) for size in (KEYS * K, H * V))
    state, states = array(1, H, K, V), array(1, T // plan.block, H, K, V)
    return (rows, k, k, v, v, state, states) if backward else (rows, k, k, v, state)


def kernel_call(op: str, tile: tuple[int, int, int], direction: str, kind: str):
    """A kernel and the shapes of its arguments."""
    chunk, chunks, heads = tile
    backward = direction == "backward"
    if op == "gated_delta_rule":
        keys = heads * KEYS // H
        plan = delta_rule_kernels.Plan(
            heads, keys, keys, chunk, chunks, scale=K**-0.5, packed=True, exact=False)
        kernels, options, arguments = delta_rule_kernels, {}, delta_rule_arguments
    else:
        plan = tpu_kernels.Plan(heads, chunk, chunks, scale=K**-0.5, exact=False, **KINDS[kind])
        kernels, options, arguments = (
            tpu_kernels, dict(decay_gradient=plan.token_decay), linear_attention_arguments)
    if backward:
        f = lambda *x: kernels.backward(plan, *x, **options)
    else:
        f = lambda *x: kernels.forward(plan, *x, keep_states=False)
    return f, arguments(plan, backward)


def meter(op: str, chip: str, tile: tuple[int, int, int], direction: str, kind: str) -> dict:
    chunk, chunks, heads = tile
    f, arguments = kernel_call(op, tile, direction, kind)
    compile_for(chip, f, *arguments)
    return dict(op=op, chip=chip, direction=direction, decay=kind, chunk=chunk, chunks=chunks,
                heads=heads) | read_schedule(f"{op}_{direction}", chunk * chunks * heads)


def _read(kernel: str, passname: str) -> list[str]:
    [file] = [x for x in _DUMP.iterdir()
              if re.match(rf"\d+-{kernel}[.\d]*-\d+-{passname}\.txt$", x.name)]
    return file.read_text(errors="replace").splitlines()


def innermost(kernel: str) -> int:
    """Bundles of the loop within all others."""
    depths = [len(found[2]) for line in _read(kernel, "final_bundles")
              if (found := re.match(r"\s*(0x[0-9a-f]+|0)[^{>]*(>*)", line))]
    return depths.count(max(depths))


def read_schedule(kernel: str, tokens: int) -> dict:
    """The figures of one grid step, which is the loop that the kernel's schedule holds."""
    in_loop = [line for line in _read(kernel, "final_bundles")
               if re.match(r"\s*(0x[0-9a-f]+|0)[^{]*>", line)]
    regions = re.findall(r"ordinal=(\d+) before=\d+ after=(\d+)",
                         "\n".join(_read(kernel, "region-expansion")))
    use, cycles_of_largest = unit_use(kernel)
    # Regions 0 and 1 enclose everything; the largest other one is the loop's body, if it has one.
    cycles = max(int(after) for ordinal, after in regions if int(ordinal) > 1)
    if cycles < len(in_loop):
        cycles = cycles_of_largest
    return dict(cycles_per_token=round(cycles / tokens, 3), cycles_per_step=cycles,
                matrix_unit=use.get("MXU", 0), spills=use["spills"], **busiest(use))


def busiest(use: dict) -> dict:
    """The unit of which most slots are in use."""
    unit = max((unit for unit in use if unit != "spills"), key=use.get)
    return dict(busiest=UNITS[unit], busiest_share=use[unit])


def unit_use(kernel: str) -> tuple[dict, int]:
    """Shares of the slots in use, by unit, over the largest part of the kernel, and spills; and
    the cycles of that part."""
    [file] = _DUMP.glob("*-TLP-*-hlo-static-bundle-profile.txt")
    parts = []
    for block in file.read_text(errors="replace").split("HLO: ")[1:]:
        if block.lstrip("%").startswith(kernel):
            parts.append({unit: (int(used), int(capacity)) for unit, used, capacity in
                          re.findall(r"^ - (.+?): \((\d+)/(\d+)\)", block, re.M)})
    body = max(parts, key=lambda part: part["VECTOR_EUP"][1])
    use = dict(spills=sum(part.get("VMEM_SPILL_COUNT", (0, 0))[0] for part in parts))
    for unit, (used, capacity) in body.items():
        name = next((x for x in UNITS if unit.startswith(x)), None)
        if name and capacity and not unit.endswith("ESTIMATED_STARVATION"):
            use[name] = max(use.get(name, 0), round(used / capacity, 3))
    return use, body["VECTOR_EUP"][1]


def estimate_xla(op: str, chip: str, direction: str) -> float:
    """Estimated cycles per token and head of the XLA form, for a decay per head if it may be.

    Rows so short that no loop counts once: the scan over the states of linear attention is
    unrolled for eight chunks, that of the delta rule has one chunk.
    """
    B, T = dict(linear_attention=(1, 1024), gated_delta_rule=(4, 64))[op]
    array = lambda heads, *width: jax.ShapeDtypeStruct(
        (B, T, heads, *width), jnp.bfloat16 if width else jnp.float32)
    if op == "linear_attention":
        decay = -alibi_slopes(H).astype("float32")
        forward = lambda *x: linear_attention.linear_attention(*x, decay, implementation="xla")[0]
        arrays = [array(H, K)] * 3
    else:
        forward = lambda *x: gated_delta_rule.gated_delta_rule(*x, implementation="xla")[0]
        arrays = [array(KEYS, K), array(KEYS, K), array(H, V), array(H), array(H)]
    f = forward
    if direction == "backward":
        f = lambda do, *x: jax.vjp(forward, *x)[1](do)
        arrays = [array(H, V), *arrays]
    cycles = re.findall(r'estimated_cycles\\?"?:\\?"?(\d+)',
                        compile_for(chip, f, *arrays).as_text())
    return round(sum(map(int, cycles)) / (B * T * H), 2)


def hbm_bound(op: str, chip: str, direction: str) -> float | None:
    """Cycles per token and head to move the arrays, in bfloat16."""
    _, bandwidth, clock = CHIPS[chip]
    return clock and round(MOVED[op][direction] * 2 * K / bandwidth * clock, 2)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def table(results: dict) -> str:
    lines = [
        "# Static figures of the TPU kernels",
        "",
        f"`python -m benchmarks.static_kernels`: {listed(results['versions'])}.",
        f"bfloat16, K = V = {K}, {H} heads (of the delta rule's q and k, {KEYS}). Cycles are per",
        "token and head; the backward pass of the delta rule computes its forward pass again. A",
        "tile is tokens per chunk x chunks x heads of a grid step; the one that is used is marked.",
        "Static: waits for HBM are not timed and the bodies of `pl.when` count as taken. `HBM` is",
        "the time to move the arrays, in cycles at the assumed clock.",
        "`XLA` is the compiler's estimate for `xla.py`, HBM time included.",
        "",
    ]
    for op in MOVED:
        lines += [
            f"## {op}",
            "",
            "| chip | direction | decay | tile | cycles | HBM | XLA | matrix unit | spills | "
            "busiest |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [line_of(row, results) for row in results["rows"] if row["op"] == op]
        lines.append("")
    return "\n".join(lines)


def line_of(row: dict, results: dict) -> str:
    op, chip, direction = row["op"], row["chip"], row["direction"]
    tile = row["chunk"], row["chunks"], row["heads"]
    bound = results["hbm"][op][chip][direction]
    used = " (used)" if tile == USED[op] else ""
    return (
        f"| {chip} | {direction} | {row['decay']} | {' x '.join(map(str, tile))}{used} | "
        f"{row['cycles_per_token']:.2f} | "
        f"{'' if bound is None else bound} | {results['xla'][op][chip][direction]} | "
        f"{row['matrix_unit']:.2f} | {row['spills']} | "
        f"{row['busiest']} {row['busiest_share']:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/static_kernels"))
    parser.add_argument("--ops", nargs="+", choices=MOVED, default=list(MOVED),
                        help="the others' rows are kept")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS),
                        help="the others' rows are kept")
    parser.add_argument("--sweep", nargs="*", choices=CHIPS, default=["v5e", "v6e"],
                        help="chips for which other tiles than the one in use are measured too")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    results = dict(versions=versions(), rows=[], hbm={}, xla={})
    if file.exists() and (old := json.loads(file.read_text()))["versions"] == versions():
        results = old
    again = lambda row: row["chip"] in args.chips and row["op"] in args.ops
    results["rows"] = [row for row in results["rows"] if not again(row)]
    for op, chip in itertools.product(args.ops, args.chips):
        for key, figure in dict(hbm=hbm_bound, xla=estimate_xla).items():
            results[key].setdefault(op, {})[chip] = {
                direction: figure(op, chip, direction) for direction in MOVED[op]}
        for direction in MOVED[op]:
            runs = [(USED[op], kind) for kind in DECAYS[op]]
            if chip in args.sweep:
                runs += [(tile, DECAYS[op][0]) for tile in TILES[op] if tile != USED[op]]
            for tile, kind in runs:
                results["rows"].append(meter(op, chip, tile, direction, kind))
                print(json.dumps(results["rows"][-1]), flush=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
