"""Scores a teacher's layers: `python -m hybridjax.search --config=configs/halo.py`.

Runs a conversion as far as its selection, and prints what every layer costs and which layers each
rule would keep. `hybridjax.distill` with the same config goes on from there.
"""

import jax

from hybridjax import command
from hybridjax.distill import define_flags, open_conversion
from hybridjax.files import read_json
from hybridjax.halo import stages


def main() -> None:
    halo, workdir = open_conversion()
    done = stages.run(["transfer", "align", "select"], halo, workdir)
    if done and jax.process_index() == 0:
        path = workdir / "select" / "scores.json"
        print(table(read_json(path)))
        print(f"numbers: {path}")


def table(scores: dict) -> str:
    """A line per model of the sweep, then a line per rule."""
    if "models" not in scores:
        return f"{scores['layers']} ({scores['rule']})"
    lines = [f"{'model':>14} {'recall':>8} {'text':>8} {'KL':>8}"]
    for name, row in scores["models"].items():
        numbers = " ".join(f"{row[key]:8.4f}" for key in ("recall", "commonsense", "kl"))
        lines.append(f"{name:>14} {numbers}")
    lines.append(f"{'rule':>14}  layers kept: scores")
    for rule, kept in scores["kept"].items():
        values = " ".join(f"{x:.4g}" for x in scores["importance"].get(rule, ()))
        lines.append(f"{rule:>14}  {', '.join(map(str, kept)) or 'none'}: {values}")
    return "\n".join([*lines, f"stack: {scores['layers']} ({scores['rule']})"])


if __name__ == "__main__":
    define_flags()
    command.run(main, preemptible=True)
