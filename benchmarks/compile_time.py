"""Seconds to compile the gradient of a stack's loss, and how many bodies its plan has.

    python -m benchmarks.compile_time                # tiny width
    python -m benchmarks.compile_time --full         # and the 9b preset at its own shapes

Nothing is computed: models are abstract, so a CPU compiles any size.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp

from configs import hypenet
from hybridjax.aot.program import bodies
from hybridjax.config import ModelConfig, typed
from hybridjax.loss import next_token_loss
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder

STACKS = {"8 layers": "LLLA" * 2, "36 layers": "LLLA" * 9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the 9b preset at its own shapes too")
    args = parser.parse_args()

    tiny = typed(hypenet.get_config("tiny").model, ModelConfig)
    released = typed(hypenet.get_config("9b").model, ModelConfig)
    rows = [
        (f"{name}, tiny width", dataclasses.replace(tiny, layers=layers, scan=scan), 128)
        for scan in (True, False)
        for name, layers in STACKS.items()
    ]
    irregular = dataclasses.replace(tiny, layers=released.layers)
    rows.append(("9b's stack, tiny width", irregular, 128))
    if args.full:
        rows.append(("9b at its own shapes", released, 4096))

    measure(tiny, 128)  # what a process does once
    print(f"{'':28} {'scan':>5} {'layers':>6} {'bodies':>6} {'trace s':>8} {'compile s':>9}")
    for name, config, length in rows:
        count, trace, compile = measure(config, length)
        print(
            f"{name:28} {config.scan!s:>5} {len(config.layers):6} {count:6} {trace:8.1f} "
            f"{compile:9.1f}",
            flush=True,
        )


def measure(config: ModelConfig, length: int) -> tuple[int, float, float]:
    """Compiled bodies; seconds to trace and lower; seconds to compile."""
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    @jax.jit
    def gradient(model, tokens):
        def loss(model):
            h = model.hidden(tokens, Context.of_rows(tokens))
            return next_token_loss(model, h, tokens, jnp.ones(tokens.shape))[0]

        return jax.grad(loss)(model)

    start = time.perf_counter()
    lowered = gradient.lower(model, tokens)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return bodies(model), middle - start, end - middle


if __name__ == "__main__":
    main()
