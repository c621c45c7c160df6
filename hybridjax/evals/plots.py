"""The pictures that a run leaves."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "figure.dpi": 130,
    "axes.titlesize": 10,
}


def loss(lines: Sequence[dict[str, Any]], path: str | os.PathLike, title: str) -> None:
    """Training loss and answer accuracy over steps."""
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return
    steps = [line["step"] for line in trained]
    with plt.rc_context(_STYLE):
        figure, left = plt.subplots(figsize=(6, 3.2), layout="constrained")
        left.plot(steps, [float(x["loss"]) for x in trained], color="C0", label="loss")
        left.set(xlabel="step", ylabel="training loss", yscale="log", title=title)
        if any(x["answer_accuracy"] for x in trained):
            right = left.twinx()
            accuracy = [x["answer_accuracy"] for x in trained]
            right.plot(steps, accuracy, color="C1", label="answers")
            right.set(ylim=(0, 1.02), ylabel="answer tokens right")
            right.yaxis.label.set_color("C1")
        left.yaxis.label.set_color("C0")
        _save(figure, path)


def needle_heatmap(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Exact match by length and depth: a row of panels per number of facts, a panel per base."""
    cells = results["needle"]
    facts = sorted({c["facts"] for c in cells})
    bases = list(dict.fromkeys(c["logit_base"] for c in cells))
    if not cells:
        return
    with plt.rc_context(_STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = plt.subplots(
            len(facts), len(bases), squeeze=False, layout="constrained",
            figsize=(1.2 + 3.3 * len(bases), 0.8 + 2.4 * len(facts)),
        )  # fmt: skip
        for row, n in zip(axes, facts, strict=True):
            for ax, base in zip(row, bases, strict=True):
                shown = [c for c in cells if c["facts"] == n and c["logit_base"] == base]
                image = _heatmap(ax, shown)
                scaling = "no log scaling" if base is None else f"log scaling, a = {base:g}"
                ax.set_title(f"{n} facts, {scaling}")
        for ax in axes[-1]:
            ax.set_xlabel("length / training length (mean below)")
        for ax in axes[:, 0]:
            ax.set_ylabel("depth of the fact")
        figure.colorbar(image, ax=axes, label="exact match", fraction=0.03)
        figure.suptitle(f"{results['name']}: trained at {results['train_length']} tokens")
        _save(figure, path)


def _heatmap(ax, cells: Sequence[dict[str, Any]]):
    grid = list(zip(*(c["by_depth"] for c in cells), strict=True))
    image = ax.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    ax.set_xticks(range(len(cells)), [f"{c['times']}x\n{c['exact']:.2f}" for c in cells])
    depths = len(grid)
    ax.set_yticks([0, depths - 1], ["start", "end"])
    ax.tick_params(length=0)
    return image


def needle_lines(results: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Exact match by length, a line per run; dashed where the logits are not scaled."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for i, result in enumerate(results):
            first = min((c["facts"] for c in result["needle"]), default=0)
            for base in dict.fromkeys(c["logit_base"] for c in result["needle"]):
                shown = [
                    c for c in result["needle"]
                    if c["facts"] == first and c["logit_base"] == base
                ]  # fmt: skip
                ax.plot(
                    [c["times"] for c in shown],
                    [c["exact"] for c in shown],
                    marker="o", markersize=3, color=f"C{i}",
                    linestyle="--" if base is None else "-",
                    label=result["name"] + ("" if base is None else f", a = {base:g}"),
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        times = sorted({c["times"] for r in results for c in r["needle"]})
        ax.set_xticks(times, [f"{t}x" for t in times])
        ax.set(xlabel="length / training length", ylabel="needle exact match", ylim=(-0.02, 1.02))
        ax.legend(frameon=False, fontsize=8)
        _save(figure, path)


def _save(figure, path: str | os.PathLike) -> None:
    figure.savefig(path)
    plt.close(figure)
