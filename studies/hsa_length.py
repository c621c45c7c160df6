"""HSA's claim: trained on short rows, it finds a fact among millions of tokens.

    python studies/hsa_length.py                                  # all cells; hours on two cores
    python studies/hsa_length.py --models=hsa,swa_only --seeds=0 --longest=65536

Each model is trained at 256 tokens by `configs/hsa.py:tiny` or its like, and then reads rows of 256
tokens to 2^25, each in bounded pieces and once; sixteen facts are hidden in a row, and all are
asked, from the same state. Four rows per length: 64 questions, of which 16 share a row. The text
is the Python installation's own sources, standard library first, read from a random place on and
never repeated within a row; nothing was trained on it. Baselines: sliding windows alone, to the
end; full attention and HypeNet, whose caches and time grow, to 2^16.

A cell is a model, a seed and a length, kept in `docs/results/hsa_length/`; one that is there is not
measured again, and a run in `runs/hsa_length/` is resumed. The figure and its numbers go to
`docs/results/hsa_length.{png,json}`.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import random
import subprocess
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from hybridjax import generate
from hybridjax.data.retrieval import Haystack
from hybridjax.evals.batches import traced
from hybridjax.evals.questions import ask
from hybridjax.workdir import Run, open_run

ROOT = pathlib.Path("runs/hsa_length")
RESULTS = pathlib.Path("docs/results")
CELLS = RESULTS / "hsa_length"
TRAINED, LONGEST = 256, 2**25
LENGTHS = [TRAINED * 4**i for i in range(9)] + [LONGEST]
FACTS, ROWS, PIECE = 16, 4, 4096


@dataclasses.dataclass(frozen=True)
class Model:
    label: str
    config: str
    longest: int = LONGEST


MODELS = {
    "hsa": Model("SWA + HSA", "configs/hsa.py:tiny"),
    "no_bypass": Model("SWA + HSA, standard residual", "configs/hsa.py:tiny,no_bypass"),
    "swa_only": Model("SWA alone", "configs/hsa.py:tiny,swa_only"),
    "transformer": Model(
        "full attention, RoPE", f"configs/hypenet.py:tiny-transformer,seq_len={TRAINED}", 2**16
    ),
    "hypenet": Model("HypeNet", f"configs/hypenet.py:tiny,seq_len={TRAINED}", 2**16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--draw", action="store_true", help="draw what is there, measure nothing")
    given = parser.parse_args()
    names, seeds = given.models.split(","), [int(seed) for seed in given.seeds.split(",")]
    if not given.draw:
        lengths = [length for length in LENGTHS if length <= given.longest]
        missing = [
            (name, seed, length)
            for length in lengths
            for seed in seeds
            for name in names
            if length <= MODELS[name].longest and not path(name, seed, length).exists()
        ]
        text = source_text(LONGEST) if missing else ""
        for name, seed, length in missing:
            measure(name, seed, length, text)
    draw()


def path(name: str, seed: int, length: int) -> pathlib.Path:
    return CELLS / f"{name}-{seed}-{length}.json"


def source_text(least: int) -> str:
    """The Python installation's sources: the standard library, without the texts of pydoc (they are
    what was trained on), then packages until there are `least` bytes."""
    parts, size = [], 0
    for place in ("stdlib", "purelib"):
        root = pathlib.Path(sysconfig.get_paths()[place])
        for file in sorted(root.rglob("*")):
            folders = file.relative_to(root).parts
            if {"site-packages", "pydoc_data", "hybridjax"}.intersection(folders):
                continue
            if file.suffix not in (".py", ".rst", ".txt") or not file.is_file():
                continue
            parts.append(file.read_text(encoding="utf-8", errors="replace"))
            size += len(parts[-1].encode())
            if place == "purelib" and size > least:
                return "\n".join(parts)
    return "\n".join(parts)


# ---------------------------------------------------------------- one cell


def measure(name: str, seed: int, length: int, text: str) -> None:
    """Trains the model if need be, and writes the cell of one length."""
    run = open_run(trained(name, seed))
    haystack = Haystack(run.tokenizer, run.config.evaluation.split, text=text)
    if len(haystack) < length:
        raise SystemExit(f"the text has {len(haystack)} tokens: {length} would repeat it")
    rows = [read_and_ask(run, haystack, f"{seed} {length} {row}", length) for row in range(ROWS)]
    hits, deep = (np.concatenate([row[i] for row in rows]) for i in range(2))
    reading, asking = (min(row[i] for row in rows) for i in (2, 3))  # the first row compiles
    cell = dict(
        model=name, seed=seed, length=length, steps=run.step, questions=len(hits), rows=ROWS,
        facts=FACTS, exact=float(hits.mean()), deep_questions=int(deep.sum()),
        deep=float(hits[deep].mean()) if deep.any() else None,
        reading_tokens_per_second=length / reading, asking_seconds_per_question=asking / FACTS,
        peak_memory=generate.peak_memory(),  # of the process, which reads shorter rows first
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )  # fmt: skip
    CELLS.mkdir(parents=True, exist_ok=True)
    path(name, seed, length).write_text(json.dumps(cell, indent=1) + "\n")
    print(f"{name} seed {seed} length {length:,}: exact {cell['exact']:.3f}", flush=True)


def read_and_ask(
    run: Run, haystack: Haystack, seed: str, length: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """For each fact of a row whether its value is answered, and whether it lies more than a
    training length back; and the seconds that reading and asking took."""
    tokens, questions, starts = haystack.questioned(
        random.Random(seed), length - haystack.width, FACTS
    )
    tokens, questions = np.array(tokens, np.int32), np.array(questions, np.int32)
    state = generate.new_state(run.model, 1, length, chunks_on_host=True)
    base = traced(run.logit_base)
    began = time.perf_counter()
    state, _ = jax.block_until_ready(
        generate.prefill(run.model, [tokens], state, logit_base=base, piece=min(PIECE, length))
    )
    read = time.perf_counter()
    speed = f"{length / (read - began):,.0f} tokens/s, {generate.sizes(state)}"
    print(f"read {length:,} tokens, {speed}", flush=True)
    _, predicted = ask(run.model, state, jnp.asarray(questions), base)
    first, last = haystack.value_start, haystack.width - 1
    hits = np.asarray(predicted)[:, first - 1 : last - 1] == questions[:, first:last]
    asked = time.perf_counter()
    deep = len(tokens) - np.array(starts) > TRAINED
    return hits.all(axis=1), deep, read - began, asked - read


def trained(name: str, seed: int) -> pathlib.Path:
    """The work directory of a finished run."""
    workdir = ROOT / f"{name}-{seed}"
    if not (workdir / "evaluation.json").exists():
        train = [sys.executable, "-m", "hybridjax.train", f"--config={MODELS[name].config}"]
        train += [f"--workdir={workdir}", f"--config.seed={seed}"]
        train += ["--config.evaluation.lengths=(1,)", "--config.evaluation.facts=(4,)"]
        subprocess.run(train, check=True)
    return workdir


# ---------------------------------------------------------------- the figure


def draw() -> None:
    cells = [json.loads(file.read_text()) for file in sorted(CELLS.glob("*.json"))]
    figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for i, (name, model) in enumerate(MODELS.items()):
        mine = [cell for cell in cells if cell["model"] == name]
        lengths = sorted({cell["length"] for cell in mine})
        if not lengths:
            continue
        at = [[c["exact"] for c in mine if c["length"] == length] for length in lengths]
        seeds = max(map(len, at))
        label = f"{model.label} ({seeds} seed{'s' if seeds > 1 else ''})"
        ax.plot(lengths, [np.median(x) for x in at], color=f"C{i}", marker="o", label=label)
        ax.fill_between(lengths, [min(x) for x in at], [max(x) for x in at], alpha=0.15)
    ax.axvline(TRAINED, color="grey", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set(
        xlabel=f"tokens read (trained at {TRAINED})", ylim=(-0.02, 1.02),
        ylabel=f"exact match, {FACTS} facts, median over seeds",
    )  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "hsa_length.png", dpi=130)
    (RESULTS / "hsa_length.json").write_text(json.dumps(cells, indent=1) + "\n")


if __name__ == "__main__":
    main()
