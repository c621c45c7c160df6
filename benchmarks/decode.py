"""HypeNet-2B beside Qwen3-1.7B, whose body it has: reading a prompt, and writing after it.

    python -m benchmarks.decode                      # 4K to 1M tokens: an accelerator's work
    python -m benchmarks.decode --first=128 --last=256 --shrink=16

Random weights. The paper reports 3.4 times the speed in reading and 3.0 times in writing at 512K
tokens, on an A800 (arXiv 2601.22156).
"""

import argparse
import pathlib

from ml_collections import ConfigDict

from benchmarks import long_context
from configs import hypenet
from hybridjax.config import typed
from hybridjax.models import block, mixer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    long_context.add_lengths(parser, first=4096)
    parser.add_argument("--shrink", type=int, default=1, help="divides the width: for a trial")
    parser.add_argument("--output", default="docs/results/decode.json")
    args = parser.parse_args()

    configs = {"hypenet-2b": hypenet.get_config("2b"), "qwen3-1.7b": qwen3()}
    for config in configs.values():
        config.model.width //= args.shrink
    configs = {name: typed(config) for name, config in configs.items()}
    results = long_context.compare(configs, long_context.lengths_of(args), args.limit)
    ratios = speedups(*(result["points"] for result in results.values()))
    for row in ratios:
        print(f"{row['length']:9}  reading {row['prefill']:.2f}x  writing {row['decode']:.2f}x")
    long_context.write(results, pathlib.Path(args.output), speedups=ratios, shrink=args.shrink)


def qwen3() -> ConfigDict:
    """Qwen3-1.7B: HypeNet-2B with its attention, rotary and without gates, in every layer."""
    config = hypenet.get_config("2b")
    config.name, depth = "qwen3-1.7b", len(config.model.layers)
    attention = dict(config.model.blocks.A.mixers[0]) | dict(rope=True, theta=1e6, gate=False)
    config.model.layers = "A" * depth
    config.model.blocks = dict(A=block(mixer(**attention), mlp=config.model.blocks.A.mlp))
    return config


def speedups(hybrid: list[dict], transformer: list[dict]) -> list[dict]:
    """How much faster the hybrid is, at each length that both reached."""
    return [
        dict(
            length=ours["length"],
            prefill=theirs["prefill_seconds"] / ours["prefill_seconds"],
            decode=theirs["decode_seconds"] / ours["decode_seconds"],
        )
        for ours, theirs in zip(hybrid, transformer, strict=False)
    ]


if __name__ == "__main__":
    main()
