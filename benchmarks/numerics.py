"""A report card of the recurrences: errors of outputs and gradients against float64.

    python -m benchmarks.numerics                    # to a million tokens, about 10 minutes
    python -m benchmarks.numerics --last=16384

The truth is the recurrence, token by token in float64, on the very numbers that the implementation
was given (for bf16: rounded ones). The error of an array is the root mean square of the difference
over that of the truth, or over a thousandth of the largest gradient's where that is more. Beside
the gated delta rule stands transformers' chunked form in f32, where the parity extra is installed.
Writes JSON and a figure: the worst array of each row by length, for each strength of the decay.
"""

import argparse
import importlib.util
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks.record import machine, save
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import linear_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

OPS = {"linear_attention": linear_attention, "gated_delta_rule": gated_delta_rule}
DECAYS = {"none": 0.0, "weak": 1e-4, "usual": 0.05, "strong": 5.0}  # mean of -log decay
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
WIDTH = 32  # of keys and values; one head
BLOCK = 1024  # tokens whose states the truth keeps at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=1024, help="no length is less")
    parser.add_argument("--last", type=int, default=2**20,
                        help="the longest; each other one is an eighth of the next")  # fmt: skip
    parser.add_argument("--implementation", default=None, help="default: the device's best")
    parser.add_argument("--output", default="docs/results/numerics.json")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    lengths = [args.last]
    while lengths[0] >= 8 * args.first:
        lengths.insert(0, lengths[0] // 8)
    rows = []
    for op in OPS:
        for decay in DECAYS:
            for length in lengths:
                rows += errors(op, decay, length, args.implementation)
    output = pathlib.Path(args.output)
    save(output, json.dumps(dict(machine=machine(), width=WIDTH, rows=rows), indent=1) + "\n")
    draw(rows, output.with_suffix(".png"))


def errors(op: str, decay: str, length: int, implementation: str | None) -> list[dict]:
    """A row per dtype, and one of the outside reference."""
    exact, found = arguments(op, DECAYS[decay], length), []
    for name, dtype in DTYPES.items():
        given = {n: round_to(x, dtype if n in ("q", "k", "v", "do") else jnp.float32)
                 for n, x in exact.items()}  # fmt: skip
        truth = results(op, {n: x.astype(jnp.float64) for n, x in given.items()}, in_blocks(op))
        run = lambda **x: OPS[op](**x, output_final_state=True, implementation=implementation)
        sides = {f"ours, {name}": results(op, given, run)}
        if name == "f32" and op == "gated_delta_rule" and importlib.util.find_spec("transformers"):
            sides["transformers, f32"] = pytorch(given)
        for side, result in sides.items():
            by_array = compare(result, truth)
            found.append(dict(op=op, side=side, decay=decay, length=length, errors=by_array))
            worst = max(by_array, key=by_array.get)
            print(f"{op:17} {side:18} {decay:7} {length:8}  worst {worst:13} {by_array[worst]:.1e}",
                  flush=True)  # fmt: skip
    return found


def arguments(op: str, decay: float, length: int) -> dict[str, np.ndarray]:
    """One row and head; keys of length one, as layers make them; `do` is the outputs' gradient."""
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 1, length, 1, WIDTH))
    gate = lambda x: x.reshape(1, length, 1)
    arrays = dict(
        q=q,
        k=k / np.linalg.norm(k, axis=-1, keepdims=True),
        v=v,
        decay=gate(-decay * rng.exponential(size=length)),
        initial_state=rng.standard_normal((1, 1, WIDTH, WIDTH)),
        do=do,
    )
    return arrays | ({"beta": gate(rng.uniform(size=length))} if op == "gated_delta_rule" else {})


def round_to(x: np.ndarray, dtype) -> jax.Array:
    return jnp.asarray(x, jnp.float64).astype(dtype)


def results(op: str, given: dict[str, jax.Array], run: Callable) -> dict[str, jax.Array]:
    """Outputs, the final state, and the gradients of `vdot(outputs, do)` by every argument."""

    @jax.jit
    def both(inputs, do):
        def loss(inputs):
            o, state = run(**inputs)
            return jnp.vdot(o.astype(state.dtype), do.astype(state.dtype)), (o, state)

        gradients, (o, state) = jax.grad(loss, has_aux=True)(inputs)
        return dict(o=o, state=state) | {f"d{name}": x for name, x in gradients.items()}

    inputs = {name: x for name, x in given.items() if name != "do"}
    return jax.device_get(both(inputs, given["do"]))


def in_blocks(op: str) -> Callable:
    """The recurrence, of which only the states between blocks are kept for the gradient."""

    def run(initial_state, **rows):
        def block(state, rows):
            o, state = OPS[op](**rows, initial_state=state, output_final_state=True,
                               implementation="reference")  # fmt: skip
            return state, o

        cut = lambda x: jnp.moveaxis(x.reshape(1, -1, BLOCK, *x.shape[2:]), 1, 0)
        state, o = jax.lax.scan(jax.checkpoint(block), initial_state, jax.tree.map(cut, rows))
        return jnp.moveaxis(o, 0, 1).reshape(1, -1, *o.shape[3:]), state

    return run


def pytorch(given: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """transformers' chunked gated delta rule, which Qwen3-Next runs without kernels."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    leaves = {n: torch.tensor(np.asarray(x), requires_grad=n != "do") for n, x in given.items()}
    q, k, v, decay, state, do, beta = leaves.values()
    o, final = theirs.torch_chunk_gated_delta_rule(
        q, k, v, decay, beta, initial_state=state, output_final_state=True
    )
    o.backward(do)
    gradients = {f"d{name}": x.grad.numpy() for name, x in leaves.items() if name != "do"}
    return dict(o=o.detach().numpy(), state=final.detach().numpy()) | gradients


def compare(result: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, float]:
    rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))
    largest = max(rms(x) for name, x in truth.items() if name.startswith("d"))
    size = lambda name: max(rms(truth[name]), 1e-3 * largest if name.startswith("d") else 1e-30)
    differ = lambda name: np.asarray(result[name], np.float64) - truth[name]
    return {name: rms(differ(name)) / size(name) for name in truth}


def draw(rows: list[dict], path: pathlib.Path) -> None:
    sides = sorted({row["side"] for row in rows})
    figure, axes = plt.subplots(1, len(OPS), figsize=(10, 4), sharey=True, layout="constrained")
    for ax, op in zip(axes, OPS, strict=True):
        for i, decay in enumerate(DECAYS):
            for side, style in zip(sides, ("--", "-", ":"), strict=False):
                points = [(r["length"], max(r["errors"].values())) for r in rows
                          if (r["op"], r["side"], r["decay"]) == (op, side, decay)]  # fmt: skip
                if points:
                    ax.loglog(*zip(*points, strict=True), style, color=f"C{i}", marker="o",
                              markersize=3, label=f"{side}; decay {decay}")  # fmt: skip
        ax.set(xlabel="tokens", title=op.replace("_", " "))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    axes[0].set_ylabel("relative error of the worst array")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
