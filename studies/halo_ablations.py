"""HALO's design, part by part: what is lost where one of its choices is undone?

    python studies/halo_ablations.py                  # all cells; hours on two cores
    python studies/halo_ablations.py --seeds=0 --rows=halo,attention-rope

The rows are those of the paper (arXiv 2601.22156, tables 3 and 4, at toy scale): rotary positions
where HyPE has none and none where it has them, linear layers without what distinguishes them from
plain linear attention, layers chosen by other rules. Each row is a setting of `configs/halo.py`;
layers that the row does not choose are those of HALO's own rule. `new-gates` is the official code's
start, which `tiny` departs from.

A cell is a conversion of a seed's teacher, measured after distillation and after finetuning. Rows
without a setting of their own are cells of `halo_selection.py`, and `halo_cells.py` has what cells
share; the others go to `docs/results/halo_ablations/`. The figure and its numbers go to
`docs/results/halo_ablations.{png,json}`.
"""

import argparse
import dataclasses
import itertools
import json
import statistics

from halo_cells import ALIGNED, RESULTS, SELECTION, TEACHER, cell, convert, exact, score, stack_of
from matplotlib import pyplot as plt

STUDY = "halo_ablations"


@dataclasses.dataclass(frozen=True)
class Row:
    label: str
    settings: tuple[str, ...] = ()  # of configs/halo.py
    stages: tuple[str, ...] = ALIGNED  # those that the settings leave as they are
    rule: str = "halo"  # that chooses the layers


ROWS = {
    "halo": Row("HALO"),
    "attention-rope": Row("RoPE kept in attention", ("attention.rope=True",)),
    "linear-nope": Row("no RoPE in linear layers", ("linear.rope=False",), TEACHER),
    "linear-no-norm": Row("no QK-norm in linear layers", ("linear.qk_norm=False",), TEACHER),
    "linear-grouped": Row("no GQA to MHA in linear layers", ("linear.kv_heads=2",), TEACHER),
    "linear-no-gate": Row("no gate in linear layers", ("linear.gate=False",), TEACHER),
    "attention-no-gate": Row("no gate in attention", ("attention.gate=False",)),
    "new-gates": Row("gates start at random", ("gates=fresh",), TEACHER),
    "recall-drop": Row("layers by recall drop", rule="recall_drop"),
    "kl": Row("layers by KL", rule="kl"),
    "even": Row("layers evenly spaced", rule="even"),
    "latter-half": Row("layers evenly in the latter half", rule="latter_half"),
    "all-linear": Row("all layers linear", rule="all_linear"),
}
PANELS = (  # model and multiple of the teacher's length; 0: what its text costs there
    ("distilled", 1),
    ("distilled", 8),
    ("finetuned", 1),
    ("finetuned", 8),
    ("finetuned", 32),
    ("distilled", 0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--draw", action="store_true", help="draw what is there, train nothing")
    given = parser.parse_args()
    seeds, names = [int(seed) for seed in given.seeds.split(",")], given.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"there is no row {unknown.pop()!r}: there are {', '.join(ROWS)}")
    if not given.draw:
        for seed, name in itertools.product(seeds, names):
            stack = chosen(name, score(seed))
            convert(*place(name, stack), seed, stack, ROWS[name].settings, ROWS[name].stages)
    draw(seeds)


def chosen(name: str, scores: dict) -> str:
    """The stack of a row, by its rule."""
    return stack_of(scores["kept"][ROWS[name].rule], len(scores["layers"]))


def place(name: str, stack: str) -> tuple[str, str]:
    """The study to which a row's cells belong, and their name there."""
    return (STUDY, name) if ROWS[name].settings else (SELECTION, stack)


def measured(name: str, seed: int) -> dict | None:
    """The stack of a row's cell, and its value in each panel; None where it was not run."""
    scores = cell(SELECTION, "scores", seed)
    result = scores and cell(*place(name, chosen(name, scores)), seed)
    if not result:
        return None
    bits = lambda model: result["models"][model]["bits_per_byte"]["1"]
    value = lambda model, times: (
        exact(result, model)[times] if times else 100 * (bits(model) / bits("teacher") - 1)
    )
    panels = {title(*panel): value(*panel) for panel in PANELS}
    return dict(row=name, seed=seed, layers=result["layers"], **panels)


def title(model: str, times: int) -> str:
    return f"{model}, {f'needle {times}x' if times else 'bits over teacher, %'}"


def draw(seeds: list[int]) -> None:
    table = [m for name in ROWS for seed in seeds if (m := measured(name, seed))]
    found = {name: [m for m in table if m["row"] == name] for name in ROWS}
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(3 + 2 * len(PANELS), 1 + 0.32 * len(ROWS)), sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, panel in zip(axes, (title(*p) for p in PANELS), strict=True):
        for y, cells in enumerate(found.values()):
            values = [m[panel] for m in cells]
            ax.plot(values, [y] * len(values), "k.", markersize=4)
            if values:
                ax.plot(statistics.mean(values), y, "D", color=f"C{int(y > 0)}", alpha=0.7)
        ax.set_title(panel, fontsize=9)
        ax.grid(axis="y", color="0.9")
        if "needle" in panel:
            ax.set_xlim(-0.04, 1.04)
    axes[0].set_yticks(range(len(ROWS)), [label(n, found[n], seeds) for n in ROWS], fontsize=8)
    axes[0].set_ylim(len(ROWS) - 0.5, -0.5)
    figure.suptitle("one choice undone; diamonds: mean over seeds, dots: seeds", fontsize=10)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"{STUDY}.png", dpi=130)
    (RESULTS / f"{STUDY}.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(table)} cells of {len(ROWS) * len(seeds)}; wrote {RESULTS / STUDY}.png")


def label(name: str, cells: list[dict], seeds: list[int]) -> str:
    missing = len(seeds) - len(cells)
    note = f" ({missing} of {len(seeds)} seeds not run)" if missing else ""
    return ROWS[name].label + note


if __name__ == "__main__":
    main()
