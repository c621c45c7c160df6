"""HALO's selection rule against its rivals: is the layer that a rule keeps the right one?

    python studies/halo_selection.py                   # all cells; hours on two cores
    python studies/halo_selection.py --seeds=0

For each seed a teacher of four layers is trained, aligned and scored once; then every single layer
in turn stays attention, is distilled and finetuned, and is measured, whatever the rules say
(arXiv 2601.22156, table 4, at toy scale). Every rule's pick is marked: a rule is good if its layer
is as good as the best one. All linear, the choice of no layer, stands beside.

There is a trap, and it is marked too: what HALO's rule picks after a shorter `align`, when a layer
may look important that is only slow to align.

Each cell is a conversion in `runs/halo_selection/`, whose numbers are kept in
`docs/results/halo_selection/` (`halo_cells.py` has what cells share). The figure and its numbers go
to `docs/results/halo_selection.{png,json}`.
"""

import argparse
import json

from halo_cells import RESULTS, SELECTION, cell, convert, exact, score, stack_of
from matplotlib import pyplot as plt

DEPTH = 4  # of the tiny teacher
STACKS = [stack_of([kept], DEPTH) for kept in range(DEPTH)] + [stack_of([], DEPTH)]
SHORT = (25, 50, 100)  # steps of a short `align`, of 400
TIMES = 8  # the length, in teacher's lengths, at which layers are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--draw", action="store_true", help="draw what is there, train nothing")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if not given.draw:
        for seed in seeds:
            score(seed)
            for steps in SHORT:
                score(seed, f"align_{steps}", [f"align.steps={steps}"])
            for stack in STACKS:
                convert(SELECTION, stack, seed, stack)
    draw(seeds)


def draw(seeds: list[int]) -> None:
    figure, axes = plt.subplots(
        1, len(seeds), figsize=(4.6 * len(seeds), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    table = []
    for ax, seed in zip(axes[0], seeds, strict=True):
        scores = cell(SELECTION, "scores", seed)
        found = {stack: cell(SELECTION, stack, seed) for stack in STACKS}
        for i, model in enumerate(("distilled", "finetuned")):
            bars = [exact(r, model)[TIMES] if r else 0.0 for r in found.values()]
            ax.bar([x + 0.4 * i - 0.2 for x in range(len(bars))], bars, 0.4, label=model)
        picks = {s: [] for s in STACKS}
        rules = dict(scores["kept"]) if scores else {}
        for steps in SHORT:
            if short := cell(SELECTION, f"align_{steps}", seed):
                rules[f"halo, align {steps}"] = short["kept"]["halo"]
        for rule, kept in rules.items():
            picks[stack_of(kept, DEPTH)].append(rule)
        labels = ["\n".join([s if found[s] else f"{s} (not run)", *picks[s]]) for s in STACKS]
        ax.set_xticks(range(len(STACKS)), labels, fontsize=7)
        ax.set(title=f"seed {seed}", ylim=(0, 1.05))
        table += [
            {
                "seed": seed,
                "layers": stack,
                "picked_by": picks[stack],
                **{m: exact(result, m)[TIMES] for m in ("teacher", "distilled", "finetuned")},
                "bits_per_byte": {m: r["bits_per_byte"] for m, r in result["models"].items()},
            }
            for stack, result in found.items()
            if result
        ]
    axes[0][0].set_ylabel(f"needle exact match at {TIMES}x the teacher's length")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("the layer that stays attention, and which rules keep it", fontsize=10)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "halo_selection.png", dpi=130)
    (RESULTS / "halo_selection.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {RESULTS / 'halo_selection.png'}")


if __name__ == "__main__":
    main()
