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
                if not shown:  # measured with the chosen base only
                    ax.set_axis_off()
                    continue
                image = _heatmap(ax, shown)
                ax.set_title(f"{n} facts, {_scaling(base)}")
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


def heldout(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Bits per byte by position, at the longest length; and by length."""
    with plt.rc_context(_STYLE):
        figure, (by_position, by_length) = plt.subplots(
            1, 2, figsize=(7.5, 3), sharey=True, layout="constrained"
        )
        for i, base in enumerate(dict.fromkeys(h["logit_base"] for h in results["heldout"])):
            texts = [h for h in results["heldout"] if h["logit_base"] == base]
            longest = texts[-1]
            style = dict(color=f"C{i}", marker="o", markersize=3, label=_scaling(base))
            by_position.plot(longest["positions"], longest["by_position"], **style)
            by_length.plot(
                [h["length"] for h in texts], [h["bits_per_byte"] for h in texts], **style
            )
        by_position.set(xlabel="position (up to)", ylabel="held-out bits per byte")
        by_length.set(xlabel="length of the text")
        for ax in (by_position, by_length):
            ax.set_xscale("log", base=2)
            ax.axvline(results["train_length"], color="0.7", linewidth=1, zorder=0)
        by_length.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{results['name']}: trained at {results['train_length']} tokens (grey)")
        _save(figure, path)


def tasks(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Share of answers by length, a line per task; dashed as generated, dotted the guess."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for i, task in enumerate(dict.fromkeys(c["task"] for c in results["tasks"])):
            cells = [c for c in results["tasks"] if c["task"] == task]
            lengths, style = [c["length"] for c in cells], dict(color=f"C{i}", linewidth=1)
            exact, generated = ([c[n] for c in cells] for n in ("exact", "generated"))
            ax.plot(lengths, exact, marker="o", markersize=3, color=f"C{i}", label=task)
            ax.plot(lengths, generated, linestyle="--", **style)
            ax.plot(lengths, [c["guess"] for c in cells], linestyle=":", **style)
        ax.axvline(results["train_length"], color="0.7", linewidth=1, zorder=0)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="tokens read (grey: trained)", ylabel="answers right", ylim=(-0.02, 1.02))
        ax.set_title(f"{results['name']}: forced (solid), generated (dashed), guessed (dotted)")
        ax.legend(frameon=False, fontsize=8)
        _save(figure, path)


def retrieval(
    cells: Sequence[dict[str, Any]],
    layer: int,
    points: tuple[Sequence[float], Sequence[float]],
    path: str | os.PathLike,
    title: str,
) -> None:
    """One of HSA's layers: recall by k and by depth, and landmark scores against attention's mass
    of their chunks."""
    shown = [c for c in cells if c["layer"] == layer]
    with plt.rc_context(_STYLE):
        figure, (by_k, by_depth, theory) = plt.subplots(
            1, 3, figsize=(12, 3.6), layout="constrained"
        )
        for i, c in enumerate(shown):
            style = dict(color=f"C{i % 10}", marker="o", markersize=3)
            known = {int(k): r for k, r in c["recall"].items() if r is not None}
            by_k.plot(
                list(known), list(known.values()), label=f"{c['task']}, {c['length']}", **style
            )
            count = len(c["by_depth"])
            depths = [(place + 0.5) / count for place in range(count)]
            shares = [float("nan") if r is None else r for r in c["by_depth"]]
            by_depth.plot(depths, shares, **style)
        by_k.set_xscale("log", base=2)
        by_k.set(xlabel="k", ylabel="recall of the chunk that says it", ylim=(-0.02, 1.02))
        by_k.legend(frameon=False, fontsize=7)
        by_depth.set(
            xlabel="depth, from the start to the question", ylim=(-0.02, 1.02),
            ylabel=f"recall at {shown[0]['top_k']}",
        )  # fmt: skip
        theory.hexbin(*points, gridsize=40, bins="log", cmap="Blues", linewidths=0)
        known = [r for r in shown[0]["correlation"] if r is not None]
        mean = sum(known) / len(known) if known else float("nan")
        theory.set(
            xlabel="score of the landmark", ylabel="log of attention's mass of the chunk",
            title=f"less their means; r = {mean:.2f} ({shown[0]['length']} tokens)",
        )  # fmt: skip
        figure.suptitle(f"{title}, layer {layer} of those that read chunks")
        _save(figure, path)


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


def conversion(
    results: dict[str, Any],
    losses: dict[str, Sequence[dict[str, Any]]],
    scores: dict[str, Any],
    path: str | os.PathLike,
) -> None:
    """HALO: the loss of each stage, what the rules make of each layer, recall by length."""
    with plt.rc_context(_STYLE):
        figure, (stages, layers, recall) = plt.subplots(
            1, 3, figsize=(12.5, 3.4), layout="constrained"
        )
        for stage, lines in losses.items():
            trained = [line for line in lines if "loss" in line]
            done = [line["step"] / trained[-1]["step"] for line in trained]
            stages.plot(done, [float(line["loss"]) for line in trained], label=stage)
        stages.set(
            xlabel="part of the stage", ylabel="loss of the stage", yscale="log",
            title="stages (MSE, KL, cross-entropy)",
        )  # fmt: skip
        stages.legend(frameon=False, fontsize=8)
        _importance(layers, scores, results["layers"])
        for i, (name, model) in enumerate(results["models"].items()):
            times = [c["times"] for c in model["needle"]]
            exact = [c["exact"] for c in model["needle"]]
            recall.plot(times, exact, marker="o", markersize=3, color=f"C{i}", label=name)
        recall.set_xscale("log", base=2)
        recall.set_xticks(times, [f"{t}x" for t in times])
        recall.set(
            xlabel=f"length / {results['train_length']}, the teacher's", ylim=(-0.02, 1.02),
            ylabel="needle exact match", title="recall by length",
        )  # fmt: skip
        recall.legend(frameon=False, fontsize=8)
        _save(figure, path)


def _importance(ax, scores: dict[str, Any], stack: str) -> None:
    """Bars per layer and rule, each rule's largest score as 1; a star where the rule keeps it."""
    rules = scores.get("importance", {})
    for i, (rule, values) in enumerate(rules.items()):
        largest = max(max(values), 1e-12)
        places = [layer + 0.8 * (i + 0.5) / len(rules) - 0.4 for layer in range(len(values))]
        ax.bar(places, [v / largest for v in values], 0.8 / len(rules), color=f"C{i}", label=rule)
        for layer in scores["kept"][rule]:
            ax.plot(places[layer], max(values[layer], 0) / largest + 0.04, "*", color=f"C{i}")
    ax.set_xticks(range(len(stack)), [f"{i}\n{c}" for i, c in enumerate(stack)])
    ax.set(xlabel="layer, and what it became", ylabel="importance / the rule's largest")
    ax.set_title("layers (star: the rule keeps it)")
    if rules:
        ax.legend(frameon=False, fontsize=8)


def _scaling(base: float | None) -> str:
    return "no log scaling" if base is None else f"log scaling, a = {base:g}"


def _save(figure, path: str | os.PathLike) -> None:
    figure.savefig(path)
    plt.close(figure)
