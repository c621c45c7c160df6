"""HSA's claim: trained on short rows, it finds a fact among millions of tokens.

    python studies/hsa_length.py                                  # all cells; hours on two cores
    python studies/hsa_length.py --models=hsa,swa_only --seeds=0 --longest=65536

Each model is trained at 256 tokens by `configs/hsa.py:tiny` or its like, and reads rows of 256
to 2^25 tokens, each in bounded pieces and once; 26 facts are hidden in a row, one for each letter,
and all are asked from the same state, teacher-forced and generated. A seed reads four rows to 2^18
tokens and one beyond: 312 or 78 questions of three seeds. The text is the Python installation's own
sources, standard library first, read from a random place on and never repeated within a row.
Nothing was trained on it. Settings were chosen on other seeds and other packages' sources; but
rows of few facts came after a look at seed 1 on this text, and decoys after seed 0 failed on it.
`harder` has facts of another form, with longer values and a step of induction more, for which
nothing was chosen. Baselines: sliding windows alone, to the end; full attention, whose cache and
time grow, to 2^16.

A cell is a model, a seed and a length, kept in `docs/results/hsa_length/`; one that is there is not
measured again, and a run in `runs/hsa_length/` is resumed. The figure, its table and its numbers go
to `docs/results/hsa_length.{png,md,json}`.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import random
import resource
import subprocess
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from hybridjax import evaluate, generate
from hybridjax.data.retrieval import Haystack
from hybridjax.evals.batches import traced
from hybridjax.evals.questions import ask, write_answers
from hybridjax.workdir import Run, open_run

ROOT = pathlib.Path("runs/hsa_length")
RESULTS = pathlib.Path("docs/results")
CELLS = RESULTS / "hsa_length"
TRAINED, LONGEST = 256, 2**25
LENGTHS = [TRAINED * 4**i for i in range(8)] + [LONGEST]
SHORT = 2**18  # up to here four rows are read; beyond it one
FACTS, PIECE = 26, 4096


@dataclasses.dataclass(frozen=True)
class Model:
    label: str
    config: str
    longest: int = LONGEST


HARDER = "".join(
    f",{task}.{option}"
    for task in ("data.sources.facts", "data.sources.many", "data.sources.few", "evaluation.task")
    for option in ("separator==", "value_length=3")
)
HARDER += ",data.sources.many.decoys=0"  # for which its rows, of longer facts, have no room
MODELS = {
    "hsa": Model("SWA + HSA", "configs/hsa.py:tiny"),
    "harder": Model("SWA + HSA, harder facts", f"configs/hsa.py:tiny{HARDER}"),
    "swa_only": Model("SWA alone", "configs/hsa.py:tiny,swa_only"),
    "rope": Model("full attention, RoPE", "configs/hsa.py:tiny,rope", 2**16),
    "nope": Model("full attention, NoPE", "configs/hsa.py:tiny,nope", 2**16),
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


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was answered to the questions of one row, and how long it took."""

    forced: np.ndarray  # for each question: every token is the likeliest after the right ones
    generated: np.ndarray  # after the model's own
    deep: np.ndarray  # the fact lies more than a training length back
    reading: float  # seconds
    asking: float


def measure(name: str, seed: int, length: int, text: str) -> None:
    """Trains the model if need be, and writes the cell of one length."""
    run = open_run(trained(name, seed))
    task = run.config.evaluation.task
    haystack = Haystack(run.tokenizer, run.config.evaluation.split, text=text, **task)
    if len(haystack) < length:
        raise SystemExit(f"the text has {len(haystack)} tokens: {length} would repeat it")
    print(f"{length:,} tokens of a text of {len(haystack):,}: repeated 1.0 times", flush=True)
    began, used = time.perf_counter(), time.process_time()
    count = 4 if length <= SHORT else 1
    # Few sizes of the state, so that compiled programs serve many lengths; but full attention looks
    # at all of its cache for every piece.
    room = SHORT if length <= SHORT else LONGEST
    room = room if MODELS[name].longest == LONGEST else length
    seeds = [f"{seed} {length} {row}" for row in range(count)]
    rows = [read_and_ask(run, haystack, row, length, room) for row in seeds]
    joined = {
        part: np.concatenate([getattr(row, part) for row in rows])
        for part in ("forced", "generated", "deep")
    }
    exact = joined["forced"]
    deep = exact[joined["deep"]]
    cell = dict(
        model=name, seed=seed, length=length, steps=run.step, questions=len(exact), rows=count,
        facts=FACTS, repeated=1.0, exact=float(exact.mean()),
        generated=float(joined["generated"].mean()), deep_questions=len(deep),
        deep=float(deep.mean()) if len(deep) else None,
        # The first row compiles.
        reading_tokens_per_second=length / min(row.reading for row in rows),
        asking_seconds_per_question=min(row.asking for row in rows) / FACTS,
        seconds=time.perf_counter() - began, core_seconds=time.process_time() - used,
        peak_memory=generate.peak_memory(),  # of the process, which reads shorter rows first
        training=json.loads((run.workdir / "cost.json").read_text()),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )  # fmt: skip
    CELLS.mkdir(parents=True, exist_ok=True)
    path(name, seed, length).write_text(json.dumps(cell, indent=1) + "\n")
    print(f"{name} seed {seed} length {length:,}: exact {cell['exact']:.3f}", flush=True)


def read_and_ask(run: Run, haystack: Haystack, seed: str, length: int, room: int) -> Answers:
    """Reads one row into a state for `room` tokens, and asks for each of its facts from it."""
    tokens, questions, starts = haystack.questioned(
        random.Random(seed), length - haystack.width, FACTS
    )
    tokens, questions = np.array(tokens, np.int32), np.array(questions, np.int32)
    state = generate.new_state(run.model, 1, room, chunks_on_host=True)
    base = traced(run.logit_base)
    began = time.perf_counter()
    state, _ = jax.block_until_ready(
        generate.prefill(run.model, [tokens], state, logit_base=base, piece=min(PIECE, room))
    )
    read = time.perf_counter()
    speed = f"{length / (read - began):,.0f} tokens/s, {generate.sizes(state)}"
    print(f"read {length:,} tokens, {speed}", flush=True)
    first, last = haystack.value_start, haystack.width - 1
    right = questions[:, first:last]
    state, predicted = ask(run.model, state, jnp.asarray(questions), base)
    state, written = write_answers(
        run.model, state, jnp.asarray(questions[:, :first]), last - first, base
    )
    return Answers(
        forced=(np.asarray(predicted)[:, first - 1 : last - 1] == right).all(axis=1),
        generated=(np.asarray(written) == right).all(axis=1),
        deep=len(tokens) - np.array(starts) > TRAINED,
        reading=read - began,
        asking=time.perf_counter() - read,
    )


def trained(name: str, seed: int) -> pathlib.Path:
    """The work directory of a finished run, with what training cost in `cost.json`: all of the
    command, its compilation and its evaluation too."""
    workdir = ROOT / f"{name}-{seed}"
    if not (workdir / evaluate.RESULTS).exists():
        train = [sys.executable, "-m", "hybridjax.train", f"--config={MODELS[name].config}"]
        train += [f"--workdir={workdir}", f"--config.seed={seed}"]
        train += ["--config.evaluation.lengths=(1,)", "--config.evaluation.facts=(4,)"]
        resumed = workdir.exists()  # then this is the cost of the rest
        began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(train, check=True)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = lambda usage: usage.ru_utime + usage.ru_stime
        cost = dict(
            seconds=time.perf_counter() - began, core_seconds=spent(now) - spent(used),
            resumed=resumed,
        )  # fmt: skip
        (workdir / "cost.json").write_text(json.dumps(cost) + "\n")
    return workdir


# ---------------------------------------------------------------- table and figure


def draw() -> None:
    cells = [json.loads(file.read_text()) for file in sorted(CELLS.glob("*.json"))]
    if not cells:
        raise SystemExit(f"no cells in {CELLS}: run the study without --draw")
    lines = table(cells)
    (RESULTS / "hsa_length.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "hsa_length.json").write_text(json.dumps(cells, indent=1) + "\n")
    figure(cells)
    print("\n".join(lines))


def by_length(cells: list[dict], name: str) -> dict[int, list[dict]]:
    mine = sorted((c for c in cells if c["model"] == name), key=lambda c: (c["length"], c["seed"]))
    return {n: [c for c in mine if c["length"] == n] for n in sorted({c["length"] for c in mine})}


def table(cells: list[dict]) -> list[str]:
    """Markdown: median over seeds, and the 95 % interval of all seeds' questions together."""
    lengths = sorted({cell["length"] for cell in cells})
    lines = [
        f"Exact match of {FACTS} facts, teacher-forced: the median over seeds and, in brackets, "
        "the 95 % interval (Wilson) of all their questions together.",
        "",
        f"| model | seeds | {' | '.join(f'{n:,}' for n in lengths)} |",
        f"|---|---|{'---|' * len(lengths)}",
    ]
    for name, model in MODELS.items():
        if not (found := by_length(cells, name)):
            continue
        shown = [_shown(found[n]) if n in found else "-" for n in lengths]
        lines.append(f"| {model.label} | {max(map(len, found.values()))} | {' | '.join(shown)} |")
    return lines


def _shown(cells: list[dict]) -> str:
    low, high = wilson(
        sum(c["exact"] * c["questions"] for c in cells), sum(c["questions"] for c in cells)
    )
    return f"{np.median([c['exact'] for c in cells]):.2f} ({low:.2f}-{high:.2f})"


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of which `hits` of `n` were seen (Wilson 1927)."""
    share = hits / n
    middle = share + z**2 / (2 * n)
    half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def figure(cells: list[dict]) -> None:
    """Median over seeds and their range."""
    drawn, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for i, (name, model) in enumerate(MODELS.items()):
        if not (found := by_length(cells, name)):
            continue
        at = [[cell["exact"] for cell in some] for some in found.values()]
        seeds = max(map(len, at))
        label = f"{model.label} ({seeds} seed{'s' if seeds > 1 else ''})"
        ax.plot(list(found), [np.median(x) for x in at], color=f"C{i}", marker="o", label=label)
        ax.fill_between(
            list(found), [min(x) for x in at], [max(x) for x in at], color=f"C{i}", alpha=0.15
        )
    ax.axvline(TRAINED, color="grey", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set(
        xlabel=f"tokens read (trained at {TRAINED})", ylim=(-0.02, 1.02),
        ylabel=f"exact match, {FACTS} facts, median over seeds",
    )  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    drawn.savefig(RESULTS / "hsa_length.png", dpi=130)
    plt.close(drawn)


if __name__ == "__main__":
    main()
