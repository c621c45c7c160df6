"""HyPE's claim: rotary positions belong in the linear layers, none in the attention layers.

    python studies/hype.py                 # all cells; about an hour on two cores
    python studies/hype.py --seeds=0 --presets=tiny,tiny-transformer

Four models of one size, three seeds each (arXiv 2601.22156, figure 8 and tables 3 and 14, at toy
scale): `tiny` (HyPE), `tiny-transformer` (RoPE everywhere), `tiny-reverse` (RoPE in attention, none
in linear layers), `tiny-nope` (attention without positions everywhere). A model that is below 0.9
at its training length is trained again, for 3 and then 8 times the steps; one that is still below
has not learned the task, and says nothing about length. A harder variant of the task, on which
nothing was tuned, stands beside.

Each cell is a run in `runs/hype/`, resumed if it was interrupted; its evaluation is kept in
`docs/results/hype/`, and a cell that is there is not trained again. The figure and its numbers go
to `docs/results/hype.{png,json}`.
"""

import argparse
import itertools
import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
from matplotlib import pyplot as plt

PRESETS = {
    "tiny": "HyPE: RoPE in linear, none in attention",
    "tiny-transformer": "Transformer: RoPE in attention",
    "tiny-reverse": "reversed: RoPE in attention, none in linear",
    "tiny-nope": "Transformer without positions",
}
BUDGETS = (1, 3, 8)  # times the steps of `tiny`; `--budgets` leaves out those known to be too small
LEARNED = 0.9
EXAMPLES = 100  # per length, base and seed
TASKS = {  # name -> additions to the preset
    "default": "",
    "harder": "data.sources.facts.separator==,evaluation.task.separator==,"
    "data.sources.facts.value_length=3,evaluation.task.value_length=3",
}
ROOT = pathlib.Path("runs/hype")
RESULTS = pathlib.Path("docs/results")
CELLS = RESULTS / "hype"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--draw", action="store_true", help="draw what is there, train nothing")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    presets, tasks = given.presets.split(","), given.tasks.split(",")
    budgets = [int(budget) for budget in given.budgets.split(",")]
    if not given.draw:
        for task, preset, seed in itertools.product(tasks, presets, seeds):
            train(preset, seed, task, budgets)
    draw(seeds)


def train(preset: str, seed: int, task: str, budgets: list[int]) -> None:
    """Trains a cell with the smallest of the budgets with which it learns the task."""
    for budget in budgets:
        result = cell(preset, seed, task, budget)
        if result is None:
            workdir = path(preset, seed, task, budget)
            config = ",".join(filter(None, [preset, TASKS[task]]))
            command = [
                sys.executable, "-m", "hybridjax.train", f"--workdir={workdir}",
                f"--config=configs/hypenet.py:{config}", f"--config.seed={seed}",
                f"--config.steps={budget * default_steps()}",
                "--config.evaluation.facts=(4,)", f"--config.evaluation.examples={EXAMPLES}",
            ]  # fmt: skip
            print(f"== {workdir}", flush=True)
            subprocess.run(command, check=True)
            CELLS.mkdir(parents=True, exist_ok=True)
            shutil.copy(workdir / "evaluation.json", CELLS / f"{workdir.name}.json")
            result = cell(preset, seed, task, budget)
        if at_training_length(result) >= LEARNED:
            return


def default_steps() -> int:
    return runpy.run_path("configs/hypenet.py")["get_config"]().steps


def path(preset: str, seed: int, task: str, budget: int) -> pathlib.Path:
    return ROOT / f"{preset}-{task}-{seed}-{budget}x"


def cell(preset: str, seed: int, task: str, budget: int) -> dict | None:
    file = CELLS / f"{path(preset, seed, task, budget).name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def best_cell(preset: str, seed: int, task: str) -> tuple[dict, int] | None:
    """The cell of the largest budget that was trained, and the budget."""
    trained = [(c, b) for b in BUDGETS if (c := cell(preset, seed, task, b)) is not None]
    return trained[-1] if trained else None


def at_training_length(result: dict) -> float:
    return scores(result, scaled=False)[1]


def scores(result: dict, scaled: bool) -> dict[int, float]:
    """Exact match by multiple of the training length, for the first number of facts; beyond the
    training length only facts that lie before the last training length count."""
    facts = result["needle"][0]["facts"]
    return {
        c["times"]: c["exact"] if c["deep"] is None else c["deep"]
        for c in result["needle"]
        if c["facts"] == facts and (c["logit_base"] is not None) == scaled
    }


def draw(seeds: list[int]) -> None:
    figure, axes = plt.subplots(
        1, len(TASKS), figsize=(5.5 * len(TASKS), 4.6), sharey=True, layout="constrained"
    )
    table = []
    for ax, task in zip(np.atleast_1d(axes), TASKS, strict=True):
        for i, (preset, label) in enumerate(PRESETS.items()):
            found = [c for seed in seeds if (c := best_cell(preset, seed, task))]
            learned = [r for r, _ in found if at_training_length(r) >= LEARNED]
            table += [
                dict(preset=preset, task=task, seed=r["seed"], budget=b, tokens=r["tokens"],
                     learned=at_training_length(r) >= LEARNED, logit_base=r["logit_base"],
                     plain=scores(r, False), scaled=scores(r, True))
                for r, b in found
            ]  # fmt: skip
            if not found:
                ax.plot([], [], color=f"C{i}", label=f"{label}: missing")
                continue
            count = f"{len(learned)}/{len(found)} seeds learned"
            for scaled, style in ((False, "--"), (True, "-")):
                lines = [scores(r, scaled) for r in (learned or [r for r, _ in found])]
                lines = [line for line in lines if line]
                if lines:
                    times = sorted(lines[0])
                    median = [np.median([line[t] for line in lines]) for t in times]
                    ax.plot(
                        times, median, style, color=f"C{i}", marker="o", markersize=3,
                        alpha=1.0 if learned else 0.3,
                        label=f"{label} ({count})" if scaled else None,
                    )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16, 32], ["1x", "2x", "4x", "8x", "16x", "32x"])
        ax.set(xlabel="length / training length", ylim=(-0.02, 1.02), title=f"{task} task")
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    np.atleast_1d(axes)[0].set_ylabel("needle exact match, median over seeds")
    figure.suptitle("solid: logits scaled by log position; dashed: not scaled", fontsize=9)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "hype.png", dpi=130)
    (RESULTS / "hype.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {RESULTS / 'hype.png'}")


if __name__ == "__main__":
    main()
