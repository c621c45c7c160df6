"""The promise of README's first command: the default config learns, and finds needles far beyond
its training length. Slow: it trains three seeds."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from hybridjax.data.text import SHA256

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The evaluation of each seed of the default preset, on the frozen text."""
    found = []
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as a user's
    for seed in SEEDS:
        workdir = tmp_path_factory.mktemp(f"seed{seed}")
        command = [sys.executable, "-m", "hybridjax.train", "--config=configs/hypenet.py"]
        command += [f"--config.seed={seed}", f"--workdir={workdir}"]
        subprocess.run(command, check=True, env=env)
        found.append(json.loads((workdir / "evaluation.json").read_text()))
    return found


def median(results, facts, times, part):
    """The median over seeds of one cell, with the stored logit base."""
    cells = [
        next(
            c
            for c in result["needle"]
            if (c["facts"], c["times"], c["logit_base"]) == (facts, times, result["logit_base"])
        )
        for result in results
    ]
    assert all(cell["examples"] >= 200 for cell in cells)
    return statistics.median(cell[part] for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("facts", "times", "part", "least"),
    [(4, 1, "exact", 0.95), (4, 8, "deep", 0.95), (4, 32, "deep", 0.9), (16, 8, "deep", 0.85)],
)
def test_needles_are_found(results, facts, times, part, least):
    assert all(result["text_sha256"] == SHA256 for result in results)
    assert all(result["train_length"] >= 128 for result in results)
    assert median(results, facts, times, part) >= least
