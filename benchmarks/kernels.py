"""Time and memory of the kernels at the shapes of published models, beside their peers.

    python -m benchmarks.kernels                                   # every op and shape, 4K to 32K
    python -m benchmarks.kernels --ops=gated_delta_rule --shapes=qwen3-next-80b --lengths=32768

Each implementation that serves on this device runs forward, and forward and backward, on one row;
beside it the peers that are installed: flash-linear-attention's Triton kernels on a GPU, PyTorch's
chunked gated delta rule on a CPU, and dense causal attention with as many heads of the same width,
which is what the layer would be otherwise. Sides take turns; a time is the median with quartiles.

The roofline is the later of the least arithmetic at the peak of the data sheet and the least
traffic at its bandwidth; `work` writes both down. Memory is what the compiled program asks for.
Writes JSON and, per op, a figure of time against length.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks.record import machine, save, spread, take_turns
from hybridjax.aot.hardware import CHIPS
from pallas_kernels.attention import attention
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule import shapes as delta_shapes
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention import shapes as linear_shapes
from pallas_kernels.linear_attention.decay import alibi_slopes

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

IMPLEMENTATIONS = ("xla", "tpu", "gpu", "triton")
CHUNK = 64  # tokens; of the arithmetic that is counted
# Dense bf16 FLOP/s and bytes/s of NVIDIA's data sheets.
GPUS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that one row needs: FLOPs and bytes of HBM traffic."""

    flops: float
    bytes: float

    def seconds(self) -> float | None:
        """On this device, by its data sheet; None where it is not known."""
        kind = jax.devices()[0].device_kind
        tpus = {c.device_kind: (c.peak_flops / c.devices, c.hbm_bandwidth / c.devices)
                for c in CHIPS.values()}  # fmt: skip
        if kind not in GPUS | tpus:
            return None
        peak, bandwidth = (GPUS | tpus)[kind]
        return max(self.flops / peak, self.bytes / bandwidth)


def work(heads: int, key_heads: int, K: int, V: int, T: int, size: int, delta: bool,
         backward: bool) -> Work:  # fmt: skip
    """By the chunked form with `CHUNK` tokens, each product counted once and triangles half.

    Per token and head, C tokens a chunk: reading the state and writing it 2 K V each, scores
    C K, their product with values C V; the delta rule also reads the state for the old values
    2 K V, and solves for the new ones C (K + V). A gradient has two products for each one. Traffic:
    queries, keys, values and outputs once, and in the backward their gradients and themselves.
    """
    C = CHUNK
    forward = 4 * K * V + C * (K + V) + delta * (2 * K * V + C * (K + V))
    elements = T * (2 * key_heads * K + 2 * heads * V)
    return Work((3 if backward else 1) * T * heads * forward,
                (3 if backward else 1) * elements * size)  # fmt: skip


# ---------------------------------------------------------------- the ops


def linear_case(shape, T: int, dtype) -> tuple[dict, Callable, Work, Work]:
    rng = np.random.default_rng(0)
    draw = lambda width: jnp.asarray(rng.standard_normal((1, T, shape.H, width)), dtype)
    arrays = dict(q=draw(shape.K), k=draw(shape.K), v=draw(shape.V))
    if shape.decay == "token":
        decay = -jnp.asarray(rng.exponential(0.1, (1, T, shape.H)), jnp.float32)
    else:
        decay = -alibi_slopes(shape.H).astype(np.float32)
    run = lambda arrays, **how: linear_attention(**arrays, decay=decay, **how)[0]
    count = functools.partial(
        work, shape.H, shape.H, shape.K, shape.V, T, dtype.itemsize, delta=False
    )
    return arrays, run, count(backward=False), count(backward=True)


def delta_case(shape, T: int, dtype) -> tuple[dict, Callable, Work, Work]:
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    arrays = {name: fill(x) for name, x in shape.arrays(1, T, dtype).items()}
    arrays["beta"] = jax.nn.sigmoid(arrays["beta"])
    arrays["decay"] = -0.1 * jax.nn.softplus(arrays["decay"])
    run = lambda arrays, **how: gated_delta_rule(**arrays, l2_norm=True, **how)[0]
    count = functools.partial(
        work, shape.value_heads, shape.heads, shape.K, shape.V, T, dtype.itemsize, delta=True
    )
    return arrays, run, count(backward=False), count(backward=True)


OPS = {
    "linear_attention": (linear_shapes.SHAPES, linear_case),
    "gated_delta_rule": (delta_shapes.SHAPES, delta_case),
}


# ---------------------------------------------------------------- sides


@dataclasses.dataclass(frozen=True)
class Side:
    forward: Callable[[], object]
    both: Callable[[], object]  # forward and backward
    memory: dict[str, int] | None = None  # bytes of the compiled programs


def jax_side(run: Callable, arrays: dict) -> Side:
    """A function of the arrays, compiled; NotImplementedError if it cannot serve."""
    total = lambda arrays: jnp.sum(run(arrays), dtype=jnp.float32)
    programs = {
        "forward": jax.jit(run).lower(arrays).compile(),
        "both": jax.jit(jax.grad(total)).lower(arrays).compile(),
    }
    memory = {}
    for name, program in programs.items():
        m = program.memory_analysis()
        memory[name] = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    calls = {n: lambda p=p: jax.block_until_ready(p(arrays)) for n, p in programs.items()}
    return Side(calls["forward"], calls["both"], memory)


def ours(run: Callable, arrays: dict) -> dict[str, Side]:
    sides = {}
    for name in IMPLEMENTATIONS:
        try:
            sides[name] = jax_side(functools.partial(run, implementation=name), arrays)
        except (NotImplementedError, ValueError) as error:  # not on this device, or not at all
            print(f"  {name}: {str(error).splitlines()[0]}")
    return sides


def dense(arrays: dict) -> Side:
    """Causal softmax attention of as many heads: the layer that this one replaces."""
    heads = max(x.shape[2] for x in (arrays["q"], arrays["v"]))
    repeat = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)
    q, k, v = (repeat(arrays[name]) for name in ("q", "k", "v"))
    run = lambda x: attention(x["q"], x["k"], x["v"])
    return jax_side(run, dict(q=q, k=k, v=v))


def torch_side(run: Callable, arrays: dict, device: str) -> Side:
    """A PyTorch function of the same arrays; Triton kernels where `device` is cuda."""
    import torch

    tensors = {
        name: torch.tensor(np.asarray(x, np.float32)).to(
            device, torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
        ).requires_grad_()
        for name, x in arrays.items()
    }  # fmt: skip

    def wait(x):
        if device == "cuda":
            torch.cuda.synchronize()
        return x

    def both():
        for x in tensors.values():
            x.grad = None
        run(**tensors).float().sum().backward()
        return wait(None)

    def forward():
        with torch.no_grad():
            return wait(run(**tensors))

    return Side(forward, both)


def peers(op: str, arrays: dict) -> dict[str, Side]:
    """What is installed; flash-linear-attention's kernels were never run by us."""
    gpu, heads = jax.default_backend() == "gpu", arrays["v"].shape[2]
    grouped = lambda x: x.repeat_interleave(heads // x.shape[2], dim=2)
    if gpu and importlib.util.find_spec("fla"):
        import torch
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla

        slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float32, device="cuda")
        linear = lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=-slopes)[0]
        delta = lambda q, k, v, beta, decay: chunk_gated_delta_rule(
            grouped(q), grouped(k), v, decay, beta, use_qk_l2norm_in_kernel=True
        )[0]
        run = linear if op == "linear_attention" else delta
        return {"FLA (Triton)": torch_side(run, arrays, "cuda")}
    if not gpu and op == "gated_delta_rule" and importlib.util.find_spec("transformers"):
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen

        run = lambda q, k, v, beta, decay: qwen.torch_chunk_gated_delta_rule(
            grouped(q), grouped(k), v, decay, beta, use_qk_l2norm_in_kernel=True
        )[0]
        return {"PyTorch": torch_side(run, arrays, "cpu")}
    return {}


# ---------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--shapes", default="", help="names of shapes.py; default: all")
    parser.add_argument("--lengths", default="4096,8192,16384,32768")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="docs/results/kernels.json")
    args = parser.parse_args()
    output, lengths = pathlib.Path(args.output), [int(n) for n in args.lengths.split(",")]

    rows = []
    for op in args.ops.split(","):
        shapes, case = OPS[op]
        for name in args.shapes.split(",") if args.shapes else shapes:
            for T in lengths:
                print(f"{op} {name} {T}", flush=True)
                rows += measure(op, name, T, case(shapes[name], T, np.dtype(args.dtype)),
                                args.repeats)  # fmt: skip
                record = dict(machine=machine(), dtype=args.dtype, rows=rows)
                save(output, json.dumps(record, indent=1) + "\n")
        draw(op, rows, output.with_name(f"{output.stem}_{op}.png"))


def measure(op: str, shape: str, T: int, case, repeats: int) -> list[dict]:
    arrays, run, *least = case
    sides = ours(run, arrays) | {"dense attention": dense(arrays)} | peers(op, arrays)
    rows = []
    for direction, bound in zip(("forward", "both"), (w.seconds() for w in least), strict=True):
        times = take_turns({n: getattr(s, direction) for n, s in sides.items()}, repeats)
        for name, side in sides.items():
            ms = spread([1e3 * t for t in times[name]["seconds"]])
            share = None if bound is None else 1e3 * bound / ms["median"]
            row = dict(op=op, shape=shape, T=T, direction=direction, side=name, ms=ms,
                       roofline_ms=bound and 1e3 * bound,
                       share_of_roofline=None if name == "dense attention" else share,
                       memory=side.memory and side.memory[direction])  # fmt: skip
            rows.append(row)
            low, high = ms["quartiles"]
            print(f"  {direction:8} {name:16} {ms['median']:10.2f} ms  ({low:.2f} to {high:.2f})"
                  + (f"  {share:.0%} of the roofline" if row["share_of_roofline"] else ""),
                  flush=True)  # fmt: skip
    return rows


def draw(op: str, rows: list[dict], path: pathlib.Path) -> None:
    rows = [row for row in rows if row["op"] == op]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(2, len(shapes), figsize=(3.2 * len(shapes), 5.6), squeeze=False,
                                sharex=True, layout="constrained")  # fmt: skip
    for column, shape in zip(axes.T, shapes, strict=True):
        for ax, direction in zip(column, ("forward", "both"), strict=True):
            here = [r for r in rows if (r["shape"], r["direction"]) == (shape, direction)]
            for side in dict.fromkeys(r["side"] for r in here):
                points = [(r["T"], r["ms"]["median"]) for r in here if r["side"] == side]
                ax.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=side)
            bounds = [(r["T"], r["roofline_ms"]) for r in here if r["roofline_ms"]]
            if bounds:
                ax.loglog(*zip(*bounds, strict=True), "k:", label="roofline")
            lengths = sorted({r["T"] for r in here})
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths, [f"{T / 1024:g}K" for T in lengths], minor=False)
            ax.spines[["top", "right"]].set_visible(False)
        column[0].set_title(shape, fontsize=9)
        column[1].set_xlabel("tokens")
    for ax, direction in zip(axes[:, 0], ("forward", "forward and backward"), strict=True):
        ax.set_ylabel(f"{direction}, ms")
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
