"""The gated delta rule on the CPU, forward and backward, beside PyTorch's chunked form.

    python -m benchmarks.delta_rule_cpu          # needs the parity extra

The other side is `torch_chunk_gated_delta_rule` of transformers, which Qwen3-Next runs where no
kernels are installed: same arrays, same threads, f32, gradients by every array. Calls alternate in
one process and a ratio is that of neighbours: what else the machine does disturbs both. On a
machine that is not idle, believe the CPU time, and run on one core (`taskset -c 0 python -m ...`).

Then ours alone: time per token of a long row against that of a short one, in turns, and the memory
that the compiled program asks for, by length; their slope is in bytes per token and head.
"""

import argparse
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.record import CLOCKS, commit, cpu_name, spread, take_turns
from hybridjax import command
from pallas_kernels.gated_delta_rule import gated_delta_rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--long", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of keys and values")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="docs/results/delta_rule_cpu.json")
    args = parser.parse_args()

    command.prepare_jax()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    shape = dict(heads=args.heads, width=args.width)
    short, long = (arrays(length, **shape) for length in (args.length, args.long))

    check(short)
    peers = take_turns(dict(ours=ours(short), pytorch=theirs(short)), args.repeats)
    lengths = take_turns(dict(short=ours(short), long=ours(long)), args.repeats)
    memory = {n: memory_bytes(n, **shape) for n in (args.long // 4, args.long // 2, args.long)}
    growth = np.diff(list(memory.values())) / np.diff(list(memory)) / args.heads
    result = {
        "command": "python -m benchmarks.delta_rule_cpu",
        "shape": f"1 x {args.length} x {args.heads} x {args.width}, f32, forward and backward",
        "machine": f"{cpu_name()}, {threads} threads",
        "versions": f"jax {jax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "commit": commit(),
    }
    for clock in CLOCKS:
        per_token = np.divide(lengths["long"][clock], lengths["short"][clock])
        result[clock] = {name: spread(times[clock]) for name, times in peers.items()} | {
            "speedup": spread(np.divide(peers["pytorch"][clock], peers["ours"][clock])),
            f"per token, {args.long} over {args.length}": spread(
                per_token * args.length / args.long
            ),
        }
    result["memory_bytes"] = memory
    result["memory_bytes_per_token_and_head"] = growth.tolist()
    print(json.dumps(result, indent=2))
    path = pathlib.Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def arrays(length: int, heads: int, width: int) -> dict[str, np.ndarray]:
    """Arguments of the rule with keys of length one, and the gradient of its outputs."""
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 1, length, heads, width)).astype(np.float32)
    rows = (1, length, heads)
    return dict(
        q=q,
        k=k / np.linalg.norm(k, axis=-1, keepdims=True),
        v=v,
        beta=rng.uniform(0, 1, rows).astype(np.float32),
        decay=-rng.exponential(0.1, rows).astype(np.float32),
        do=do,
    )


@jax.jit
def gradients(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    inputs = {name: x for name, x in arrays.items() if name != "do"}
    return jax.grad(lambda inputs: jnp.vdot(gated_delta_rule(**inputs)[0], arrays["do"]))(inputs)


def ours(arrays):
    on_device = jax.device_put(arrays)
    return lambda: jax.block_until_ready(gradients(on_device))


def theirs(arrays):
    tensors = {name: torch.tensor(x, requires_grad=name != "do") for name, x in arrays.items()}

    def run():
        for x in tensors.values():
            x.grad = None
        q, k, v, beta, decay, do = tensors.values()
        torch_chunk_gated_delta_rule(q, k, v, decay, beta)[0].backward(do)
        return {name: x.grad for name, x in tensors.items() if name != "do"}

    return run


def check(arrays) -> None:
    """Both sides compute the same."""
    expected = theirs(arrays)()
    for name, x in ours(arrays)().items():
        y = expected[name].numpy()
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
        assert error < 1e-5, (name, error)


def memory_bytes(length: int, heads: int, width: int) -> int:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays(64, heads, width))
    longer = {n: jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for n, x in like.items()}
    memory = gradients.lower(longer).compile().memory_analysis()
    inputs, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return memory.temp_size_in_bytes + inputs + outputs


if __name__ == "__main__":
    main()
