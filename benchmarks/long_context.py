"""Seconds and memory against context length: hybrids beside a Transformer of the same size.

    python -m benchmarks.long_context
    python -m benchmarks.long_context --models hsa:tiny hsa:tiny,rope

Weights are random: neither time nor memory depends on them. For each length: reading a prompt in
pieces, writing a token after it, the bytes of the state, and those of them that the token reads.
The slope is that of a straight line through the logarithms of the last half of the lengths: 1 is
linear. Longer ones are left out once reading took longer than `--limit`.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from benchmarks.record import machine, save  # noqa: E402
from hybridjax import generate  # noqa: E402
from hybridjax.config import Config, typed  # noqa: E402
from hybridjax.mixers.chunk_memory import ChunkState  # noqa: E402
from hybridjax.mixers.hsa import HSA  # noqa: E402
from hybridjax.mixers.retrieval import Retrieval  # noqa: E402
from hybridjax.models.decoder import Decoder, DecoderState  # noqa: E402

QUANTITIES = {
    "prefill_seconds": "reading, s",
    "decode_seconds": "one token, s",
    "state_bytes": "state, bytes",
    "read_bytes": "of it read for a token, bytes",
}


@dataclasses.dataclass(frozen=True)
class Point:
    length: int
    prefill_seconds: float
    decode_seconds: float
    state_bytes: int
    read_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["hsa:tiny", "hypenet:tiny", "hypenet:tiny-transformer"],
        help="FILE:PRESET of configs/, with overrides",
    )  # fmt: skip
    add_lengths(parser, first=1024)
    parser.add_argument("--output", default="docs/results/long_context.json")
    args = parser.parse_args()
    configs = {name: config_of(name) for name in args.models}
    write(compare(configs, lengths_of(args), args.limit), pathlib.Path(args.output))


def add_lengths(parser: argparse.ArgumentParser, first: int) -> None:
    parser.add_argument("--first", type=int, default=first, help="length; then twice as long")
    parser.add_argument("--last", type=int, default=2**20)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of reading")


def lengths_of(args: argparse.Namespace) -> list[int]:
    lengths = [args.first]
    while 2 * lengths[-1] <= args.last:
        lengths.append(2 * lengths[-1])
    return lengths


def config_of(model: str) -> Config:
    """`hsa:tiny` is the preset of configs/hsa.py."""
    file, _, preset = model.partition(":")
    return typed(importlib.import_module(f"configs.{file}").get_config(preset or None))


def compare(configs: dict[str, Config], lengths: list[int], limit: float) -> dict[str, dict]:
    """Points and slopes of each model, printed as they come."""
    results = {}
    for name, config in configs.items():
        print(f"{name}: {config.model.layers}")
        print(f"{'length':>9} {'reading s':>10} {'token ms':>9} {'state MB':>9} {'read MB':>9}")
        points = list(measure(config, lengths, limit))
        slopes = {quantity: slope(points, quantity) for quantity in QUANTITIES}
        print("    slope " + "".join(f"{slopes[quantity]:10.2f}" for quantity in QUANTITIES))
        results[name] = dict(
            layers=config.model.layers,
            points=[dataclasses.asdict(point) for point in points],
            slopes=slopes,
        )
    return results


def write(results: dict[str, dict], output: pathlib.Path, **more) -> None:
    """JSON and a figure."""
    record = dict(machine=machine(), results=results, **more)
    save(output, json.dumps(record, indent=1) + "\n")
    draw(results, output.with_suffix(".png"))


def measure(config: Config, lengths: list[int], limit: float):
    """A point per length; stops after one that took longer than `limit`."""
    model = jax.jit(lambda: Decoder(config.model, jax.random.key(0)))()
    prompt = np.random.default_rng(0).integers(config.model.vocab, size=lengths[-1])
    greedy = lambda logits, key: jnp.argmax(logits, axis=-1)
    for length in lengths:
        new = lambda: generate.new_state(model, 1, length + 16)  # noqa: B023
        warm_up = prompt[: min(length, 2 * generate.PIECE)]  # pieces that are skipped, and others
        jax.block_until_ready(generate.prefill(model, [warm_up], new()))
        state, start = new(), time.perf_counter()
        prefix = jax.block_until_ready(generate.prefill(model, [prompt[:length]], state))
        read = time.perf_counter() - start
        size, read_size = generate.state_bytes(prefix[0]), read_bytes(model, prefix[0])
        stream, steps = generate.decode(model, prefix, jax.random.key(0), greedy), []
        for _ in range(12):
            start = time.perf_counter()
            next(stream)
            steps.append(time.perf_counter() - start)
        point = Point(length, read, float(np.median(steps[2:])), size, read_size)
        print(
            f"{length:9} {point.prefill_seconds:10.3f} {1e3 * point.decode_seconds:9.2f} "
            f"{point.state_bytes / 1e6:9.2f} {point.read_bytes / 1e6:9.2f}",
            flush=True,
        )
        yield point
        if point.prefill_seconds > limit:
            return


def read_bytes(model: Decoder, state: DecoderState) -> int:
    """Bytes of a state that one more token reads: of a memory of chunks the landmarks, for each
    search, and the chosen chunks, for each layer that reads them; of all else everything."""
    stack = zip(model.plan, model.groups, strict=True)
    mixers = [m for g, blocks in stack for b in blocks for m in [*b.mixers] * g.repeats]
    searches = [m for m in mixers if isinstance(m, Retrieval)]
    total = 0
    for part in jax.tree.leaves(state.layers, is_leaf=lambda x: isinstance(x, ChunkState)):
        if not isinstance(part, ChunkState):
            total += part.nbytes
            continue
        chunk = (part.keys.nbytes + part.values.nbytes) // part.keys.shape[1]
        readers = sum(isinstance(m, HSA) for m in mixers)
        total += len(searches) * part.landmarks.nbytes + readers * searches[0].top_k * chunk
    return total


def slope(points: list[Point], name: str) -> float:
    """Of log(quantity) over log(length), where lengths are longest."""
    half = points[len(points) // 2 :] if len(points) > 3 else points
    x, y = (np.log([getattr(p, key) for p in half]) for key in ("length", name))
    return float(np.polyfit(x, y, 1)[0]) if len(half) > 1 else float("nan")


def draw(results: dict, path: pathlib.Path) -> None:
    shape = dict(ncols=len(QUANTITIES), figsize=(13, 3.2))
    figure, axes = plt.subplots(**shape, layout="constrained")
    for ax, (name, label) in zip(axes, QUANTITIES.items(), strict=True):
        for preset, result in results.items():
            x = [point["length"] for point in result["points"]]
            y = [point[name] for point in result["points"]]
            ax.loglog(x, y, marker="o", markersize=3, label=f"{preset} ({result['layers']})")
        ax.set(xlabel="tokens", ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
