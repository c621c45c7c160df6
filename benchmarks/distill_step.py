"""A step of distillation beside its parts: a training step of the student, and the teacher forward.

    python -m benchmarks.distill_step
    python -m benchmarks.distill_step --preset=tiny,model.vocab=16384    # most of it is logits

Same batch, same weights, in one process; calls alternate and the ratio is that of neighbours: what
else the machine does disturbs both. On a machine that is not idle, believe the CPU time, and run on
one core (`taskset -c 0 python -m ...`): threads that wait for one another spin.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

from benchmarks.batch import random_batch
from benchmarks.record import CLOCKS, machine, save, spread, take_turns
from configs import halo as configs
from hybridjax import command
from hybridjax.config import typed
from hybridjax.halo import updates
from hybridjax.halo.config import HaloConfig, run_config
from hybridjax.sharding import make_mesh
from hybridjax.train import make_train_step, new_model, next_token_sums, put_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", help="of configs/halo.py, with overrides")
    parser.add_argument("--layers", default="LLAL", help="the student")
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", default="docs/results/distill_step.json")
    args = parser.parse_args()

    command.prepare_jax()
    halo = typed(configs.get_config(args.preset), HaloConfig)
    jax.set_mesh(make_mesh(halo.mesh))
    sides = {name: repeat(f, args.steps) for name, f in steps(halo, args.layers).items()}
    times = take_turns(sides, args.turns)

    stage = halo.distill
    result = {
        "command": f"python -m benchmarks.distill_step --preset={args.preset}",
        "shape": f"{halo.model.layers} to {args.layers}, width {halo.model.width}, vocabulary "
        f"{halo.model.vocab}, batch {stage.batch_size} x {stage.seq_len}, {stage.optimizer.name}",
        "machine": machine(),
    }
    for clock in CLOCKS:
        ratio = np.divide(times["distillation"][clock], times["its parts"][clock])
        seconds = {name: spread(np.divide(of[clock], args.steps), 5) for name, of in times.items()}
        result[clock] = {**seconds, "ratio": spread(ratio)}
        print(f"{clock}: {result[clock]}")
    output = pathlib.Path(args.output)
    results = json.loads(output.read_text()) if output.exists() else {}
    save(output, json.dumps(results | {args.preset: result}, indent=1) + "\n")


def steps(halo: HaloConfig, layers: str):
    """A step of each side; each keeps a state of its own, with the same weights at first."""
    update = updates.distillation(halo, halo.model, layers)
    train_step = make_train_step(update.optimizer, update.config)
    batch = put_batch(random_batch(update.config))
    teacher = jax.jit(lambda: new_model(run_config(halo, "distill", halo.model)))()
    first = jax.jit(lambda: update.first_state(new_model(update.config)))
    states = {name: first() for name in ("distillation", "its parts")}
    forward = jax.jit(lambda teacher: next_token_sums(0.0, teacher, batch, jax.random.key(0))[0])

    def distillation():
        states["distillation"], scalars = update.step(states["distillation"], batch, teacher)
        return scalars["loss"]

    def parts():
        states["its parts"], scalars = train_step(states["its parts"], batch)
        return scalars["loss"], forward(teacher)

    return {"distillation": distillation, "its parts": parts}


def repeat(step, count: int):
    def run():
        for _ in range(count):
            jax.block_until_ready(step())

    return run


if __name__ == "__main__":
    main()
