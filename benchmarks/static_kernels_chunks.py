"""What the TPU compiler makes of the kernels that choose chunks and read them, without a TPU.

    python -m benchmarks.static_kernels_chunks

As `static_kernels.py`, at the shapes of published models: cycles of a body of the loop over
queries, which takes a few (`chunk_sparse_attention`, all heads of a group; backward with all turns
of the loop in it, which adds up gradients), or of a step, which merges a block of landmarks into
the best of 128 queries (`chunk_topk`: its loop over the k best counts once).
Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path

from benchmarks import static_kernels  # first: it sets what libtpu reads when it is loaded

# isort: split
import jax
import jax.numpy as jnp

from pallas_kernels.chunk_sparse_attention import tpu, tpu_kernels
from pallas_kernels.chunk_sparse_attention.shapes import SHAPES
from pallas_kernels.chunk_topk import tpu as topk
from pallas_kernels.chunk_topk.shapes import SHAPES as TOPK_SHAPES
from pallas_kernels.mosaic_tpu import LANES

CHIPS = ("v5e", "v6e", "tpu7x")
MODELS = ("hsa-240m", "hsa-345m")
KERNELS = ("chunk_sparse_attention_forward", "chunk_sparse_attention_backward", "chunk_topk")
VMEM = 64 * 2**20


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def attention(chip: str, model: str, direction: str):
    """A kernel, the shapes of its arguments, the queries of a body of its loop, and how often it
    runs the loop within."""
    shape = SHAPES[model]
    strip = tpu.strip_of(shape.J, shape.chunk_size, 128 if chip == "v5e" else 256)
    plan = tpu_kernels.Plan(
        tpu._TILE, shape.J, strip, shape.chunk_size, shape.K, shape.K, shape.K**-0.5,
        off_by_one=False, joint=False, vmem=VMEM,
    )  # fmt: skip
    T, heads = 8 * tpu._TILE, max(16, shape.H // shape.G)
    q = array(1, shape.G, T, heads, plan.key_lanes)
    # Few chunks: that their gradients begin as zeros counts as taken in every step.
    kv = array(1, shape.G, T // shape.chunk_size, shape.chunk_size, plan.width)
    slots = [array(1, shape.G, 1, T * shape.J, dtype=x) for x in (jnp.int32, jnp.float32)]
    if direction == "forward":
        queries = plan.together * tpu_kernels.UNROLL
        return functools.partial(tpu_kernels.forward, plan), (q, kv, slots), queries, 1
    do = array(1, shape.G, T, heads, plan.value_lanes)
    f = functools.partial(tpu_kernels.backward, plan)
    return f, (q, kv, slots, do), plan.together, plan.turns


def selection(model: str):
    shape = TOPK_SHAPES[model]
    T, N = shape.T, shape.T // shape.chunk_size
    block = min(topk._BLOCK, N + -N % LANES)
    plan = topk.Plan(shape.k, shape.R**-0.5, block, packed=True, noisy=False)
    ids = lambda length: array(1, length, dtype=jnp.int32)
    f = lambda q, landmarks, *given: topk._choose(plan, q, landmarks, *given, None)
    arrays = array(1, T, shape.G, shape.R), array(1, N, shape.G, shape.R), ids(T), ids(T), ids(N)
    return f, arrays, LANES, 1


def meter(kernel: str, chip: str, model: str) -> dict:
    direction = kernel.removeprefix("chunk_sparse_attention_")
    f, arrays, queries, turns = (
        selection(model) if kernel == "chunk_topk" else attention(chip, model, direction))
    static_kernels.compile_for(chip, f, *arrays)
    use, cycles = static_kernels.unit_use(kernel)
    cycles += (turns - 1) * static_kernels.innermost(kernel)
    return dict(
        kernel=kernel, chip=chip, model=model, queries=queries, cycles=cycles,
        cycles_per_query=round(cycles / queries, 1), spills=use["spills"],
        **static_kernels.busiest(use),
    )  # fmt: skip


def table(rows: list[dict], versions: dict[str, str]) -> str:
    lines = [
        "# Static figures of the TPU kernels that choose chunks and read them",
        "",
        f"`python -m benchmarks.static_kernels_chunks`: {static_kernels.listed(versions)}. "
        "bfloat16, packed rows.",
        "Cycles are those of one body of the loop over queries; waits for HBM are not timed, and",
        "the loop of `chunk_topk` over its k best counts once.",
        "",
        "| kernel | model | chip | queries of a body | cycles | per query | spills | busiest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kernel']} | {r['model']} | {r['chip']} | {r['queries']} | {r['cycles']} | "
        f"{r['cycles_per_query']} | {r['spills']} | {r['busiest']} {r['busiest_share']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/static_kernels_chunks"))
    args = parser.parse_args()
    rows = []
    for run in itertools.product(KERNELS, CHIPS, MODELS):
        rows.append(meter(*run))
        print(json.dumps(rows[-1]), flush=True)
    results = dict(versions=static_kernels.versions(), rows=rows)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(rows, results["versions"]))


if __name__ == "__main__":
    main()
