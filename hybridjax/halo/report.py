"""What a conversion leaves to look at: `halo.json` and `halo.png`."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from hybridjax.data.retrieval import Haystack
from hybridjax.evals import heldout, needle, plots
from hybridjax.files import read_json
from hybridjax.halo import stages
from hybridjax.halo.config import HaloConfig
from hybridjax.metrics import read_metrics
from hybridjax.workdir import open_run

RESULTS = "halo.json"


def report(halo: HaloConfig, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures teacher and student at the teacher's lengths; writes numbers and a picture."""
    runs = {
        "teacher": stages.teacher_source(halo, workdir),
        "distilled": (workdir / "distill", None),
        "finetuned": (workdir / "finetune", None),
    }
    models = {name: open_run(*where) for name, where in runs.items()}
    length = models["teacher"].config.seq_len
    results = {
        "name": halo.name,
        "seed": halo.seed,
        "layers": stages.selected(workdir),
        "train_length": length,
        "models": {name: measure(halo, run, length) for name, run in models.items()},
    }
    if jax.process_index() == 0:
        (workdir / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        losses = {
            name: read_metrics(workdir / name)
            for name in ("teacher", "align", "distill", "finetune")
            if (workdir / name).exists()
        }
        scores = read_json(workdir / "select" / "scores.json")
        plots.conversion(results, losses, scores, workdir / "halo.png")
        print(table(results))
        print(f"numbers: {workdir / RESULTS}   picture: {workdir / 'halo.png'}")
    return results


def measure(halo: HaloConfig, run, length: int) -> dict[str, Any]:
    """Needle exact match by length, and bits per byte of held-out text at the ends."""
    ev = halo.evaluation
    haystack = Haystack(run.tokenizer, ev.split, **ev.task)
    cells = needle.by_length(
        run.model,
        haystack,
        train_length=length,
        times=ev.lengths,
        facts=ev.facts[0],
        examples=ev.examples,
        logit_bases=(None,),
    )
    bits = {
        str(times): heldout.bits_per_byte(
            run.model,
            run.tokenizer,
            heldout.rows_of_text(run.tokenizer, ev.split, times * length, ev.heldout_tokens),
        ).bits_per_byte
        for times in (1, 8)
    }
    return {"needle": [dataclasses.asdict(c) for c in cells], "bits_per_byte": bits}


def table(results: dict[str, Any]) -> str:
    times = [c["times"] for c in next(iter(results["models"].values()))["needle"]]
    lines = [
        f"{results['name']}: {results['layers']}; needle exact match by multiples of "
        f"{results['train_length']} tokens, and bits per byte of text at 1x and 8x",
        " " * 10 + "".join(f"{f'{t}x':>7}" for t in times) + f"{'bpb':>9}{'bpb 8x':>9}",
    ]
    for name, model in results["models"].items():
        exact = "".join(f"{c['exact']:7.3f}" for c in model["needle"])
        bits = "".join(f"{b:9.3f}" for b in model["bits_per_byte"].values())
        lines.append(f"{name:<10}{exact}{bits}")
    return "\n".join(lines)
