"""Trains a model: `python -m hybridjax.train --config=configs/hypenet.py`.

The same command again resumes where the work directory stands. Read `main` from top to bottom.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hybridjax import command, evaluate, huggingface, metrics, processes
from hybridjax.checkpoint import Checkpoints, restore_model
from hybridjax.config import Config, UserError, typed
from hybridjax.data import pipeline
from hybridjax.data.tokenizer import Tokenizer, load_tokenizer
from hybridjax.loss import next_token_loss
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder
from hybridjax.optimizer import make_optimizer, may_change_steps, schedule
from hybridjax.sharding import make_mesh, named_sharding, place, place_parameters, ways
from hybridjax.workdir import check_owner, claim, hold

MAY_CHANGE = ("steps", "log_every", "checkpoint.*", "evaluation.*", "mesh.*", "name")

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Int[Array, ""]
    model: nnx.Module  # a Decoder, or what else is trained
    opt_state: optax.OptState


def main() -> None:
    config = typed(command.config())
    workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/{config.name}")
    check_owner(workdir, dataclasses.asdict(config), allowed=MAY_CHANGE)
    jax.set_mesh(make_mesh(config.mesh))
    if train(config, workdir):
        evaluate.report(workdir)


def train(config: Config, workdir: pathlib.Path) -> bool:
    """Trains a language model on the mesh that is set; whether it came to the last step."""
    # ------------------------------------------------------------ model and optimizer
    abstract_model = jax.eval_shape(lambda: new_model(config))
    optimizer = make_optimizer(config.optimizer, config.steps, abstract_model)
    initial = jax.jit(lambda: new_state(config, optimizer))

    def start() -> TrainState:
        """From scratch, or a pretrained model: never both in memory."""
        if not config.init_from:
            return initial()
        model = pretrained(config, initial.eval_shape().model)
        return jax.jit(lambda model: first_state(model, optimizer), donate_argnums=0)(model)

    return fit(
        config,
        workdir,
        make_train_step(optimizer, config),
        start,
        initial.eval_shape(),
        align=abstract_model.align,
        flops=flops_per_token(abstract_model),
        measure=lambda model, tokenizer: evaluate.during_training(model, tokenizer, config),
    )


def fit(
    config: Config,
    workdir: pathlib.Path,
    train_step: Callable[[Any, Batch], tuple[Any, dict[str, Array]]],
    start: Callable[[], Any],
    abstract: Any,
    *,
    align: int,
    flops: float,
    measure: Callable[[Any, Tokenizer], dict[str, float]] | None = None,
) -> bool:
    """Takes a state through the steps of a run, from where its directory stands.

    Args:
      start: the state of a run without a checkpoint of its own.
      abstract: the same as shapes; a `TrainState` of anything that is trained.
      align: documents of a packed row start at multiples of this many tokens.
      flops: per token, forward and backward.
      measure: what to measure of a model as the run goes.

    Returns:
      whether the last step was taken; False where the run was asked to stop before.
    """
    # ------------------------------------------------------------ data
    tokenizer = _load_tokenizer(config)
    _check_sizes(config)
    loader = pipeline.make_loader(
        config.data,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        align=align,
        needed=rows_of_processes(config),
        process=jax.process_index(),
    )

    # ------------------------------------------------------------ own checkpoint, else the start
    learning_rate = schedule(config.optimizer, config.steps)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, best=config.checkpoint.best)
    if checkpoints.latest is not None:
        state, step, metadata = checkpoints.restore(abstract, loader)
        _check_length(config, metadata["config"], step)
    else:
        state, step = start(), 0
    claim(workdir, dataclasses.asdict(config), allowed=MAY_CHANGE)
    held = hold(workdir)

    writer = metrics.MetricWriter(workdir, resume_step=step)
    tokens_per_step = config.batch_size * config.seq_len
    progress = metrics.Progress(config.steps, tokens_per_step, step, flops)
    parameters = sum(x.size for x in jax.tree.leaves(state.model))
    mesh = jax.sharding.get_mesh()
    progress.note(
        f"{config.name}: {parameters:,} parameters, {config.model.layers}, "
        f"{mesh.size} {jax.devices()[0].platform} device(s), {workdir}"
        + (f", resumed at step {step}" if step else "")
    )

    # ------------------------------------------------------------ the loop
    stop = processes.StopRequest()
    results: dict[str, float] = {}  # of the evaluation at this step, if there was one
    unchecked: list[tuple[int, Float[Array, ""]]] = []  # losses that no one has looked at yet

    def check_finite() -> None:
        for at, loss in unchecked:
            if not np.isfinite(loss):
                raise _not_finite(f"the loss is {float(loss)} at step {at}", checkpoints)
        unchecked.clear()

    def save() -> None:
        check_finite()
        if not _all_finite(state):
            raise _not_finite(f"the update of step {step} is not finite", checkpoints)
        checkpoints.save(step, state, loader, {"metrics": results})

    try:
        while step < config.steps and not stop.at(step):
            batch = put_batch(next(loader), loader.rows.start, config.batch_size)
            state, scalars = train_step(state, batch)
            step, results = step + 1, {}
            processes.dispatched(step, scalars["loss"])
            unchecked.append((step, scalars["loss"]))

            if step % config.log_every == 0 or step == config.steps:
                scalars = {name: float(value) for name, value in scalars.items()}
                check_finite()
                speed = progress.report(step, scalars["loss"])
                rate = float(learning_rate(step - 1))
                writer.write(step, {**scalars, "learning_rate": rate, **speed})
            if measure and (step % config.evaluation.every == 0 or step == config.steps):
                with progress.pause():
                    results = measure(state.model, tokenizer)
                    writer.write(step, results)
                    progress.note("  ".join(f"{k} {v:.3f}" for k, v in results.items()))
            if step % config.checkpoint.every == 0 or step == config.steps:
                with progress.pause():
                    save()
        save()
    finally:
        stop.close()
        checkpoints.close()
        writer.close()
        held.close()

    if step < config.steps:
        progress.note(f"stopped at step {step}; the same command resumes")
    return step == config.steps


def new_model(config: Config) -> Decoder:
    """The model before training, each parameter where the mesh wants it."""
    return place_parameters(Decoder(config.model, jax.random.key(config.seed)))


def pretrained(config: Config, like: Decoder) -> Decoder:
    """The model of another run, or of a Hugging Face directory."""
    source, at = source_of(config.init_from)
    if huggingface.is_huggingface(source):
        return huggingface.open_directory(source).load(config.model)
    return restore_model(source, like, at)[0]


def new_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    return first_state(new_model(config), optimizer)


def first_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))


# ---------------------------------------------------------------- one update


def make_train_step(
    optimizer: optax.GradientTransformation, config: Config, gradients: Callable | None = None
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One jitted update; `accumulate` microbatches give the gradient of the whole batch.

    Args:
      gradients: `(model, batch, weight, key, *fixed) -> (loss, means, gradient)`, all of which add
        up over the parts of a batch whose `loss_weights` sum to `weight`; `means` are pairs of a
        sum and its count; `key` is for mixers that draw noise. None: of the next-token loss.
    Returns:
      `(state, batch, *fixed) -> (state, scalars)`.
    """
    gradients = gradients or gradients_of(functools.partial(next_token_sums, config.z_loss))

    def over_parts(model, batch: Batch, key: Array, *fixed):
        weight = jnp.maximum(jnp.sum(batch["loss_weights"]), 1e-8)
        one = lambda part, key: gradients(model, part, weight, key, *fixed)
        if config.accumulate == 1:
            return one(batch, key)

        def body(total, part):
            return jax.tree.map(jnp.add, total, one(*part)), None

        parts = {name: _microbatches(x, config.accumulate) for name, x in batch.items()}
        parts = parts, jax.random.split(key, config.accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x), jax.eval_shape(one, *first))
        return jax.lax.scan(body, zeros, parts)[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, *fixed) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, means, grads = over_parts(state.model, batch, key, *fixed)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        scalars = {
            "loss": loss,
            **{name: total / jnp.maximum(count, 1e-8) for name, (total, count) in means.items()},
            "gradient_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, model, opt_state), scalars

    return train_step


def gradients_of(loss_sums: Callable) -> Callable:
    """What `make_train_step` wants, of `(model, batch, key, *fixed) -> (sum of the loss,
    means)`."""

    def gradients(model, batch: Batch, weight: Float[Array, ""], key: Array, *fixed):
        def loss(model):
            total, means = loss_sums(model, batch, key, *fixed)
            return total / weight, means

        (value, means), grads = jax.value_and_grad(loss, has_aux=True)(model)
        return value, means, grads

    return gradients


def next_token_sums(
    z_loss: float, model: Decoder, batch: Batch, key: Array
) -> tuple[Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """The weighted sum of the next-token loss, and what is logged beside it."""
    ctx = Context(batch["positions"], batch["segments"], key=key)
    h = model.hidden(batch["tokens"], ctx)
    weights = batch["loss_weights"]
    total, nats, hit = next_token_loss(model, h, batch["targets"], weights, z_loss)
    return total, {"cross_entropy": real_mean(nats, batch), "answer_accuracy": hits(hit, batch)}


def real_mean(values: Float[Array, "B T"], batch: Batch) -> tuple[Array, Array]:
    """The sum of the values of real tokens, and their number."""
    real = batch["segments"] > 0
    return jnp.sum(values * real), jnp.sum(real, dtype=jnp.float32)


def hits(hit: Float[Array, "B T"], batch: Batch) -> tuple[Array, Array]:
    """The answer tokens that were predicted, and all answer tokens."""
    asked = batch["answers"] > 0
    return jnp.sum(hit * asked), jnp.sum(asked, dtype=jnp.float32)


def _microbatches(x: Array, count: int) -> Array:
    """[B, T] -> [count, B / count, T], each device keeping its rows."""
    parts = jnp.moveaxis(x.reshape(-1, count, x.shape[1]), 1, 0)
    return place(parts, None, "batch", "length")


def put_batch(batch: dict[str, np.ndarray], first: int = 0, batch_size: int | None = None) -> Batch:
    """The rows from `first` on of global arrays, of which other processes may put the others."""

    def put(x: np.ndarray) -> Array:
        shape = (batch_size or x.shape[0], *x.shape[1:])
        sharding = named_sharding(("batch", "length"), shape)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return x[start - first : stop - first, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(x) for name, x in batch.items()}


def rows_of_processes(config: Config) -> list[range]:
    """For each process the rows of a batch that its devices hold, from the first to the last."""
    shape = (config.batch_size, config.seq_len)
    places = named_sharding(("batch", "length"), shape).devices_indices_map(shape)
    held: list[list[int]] = [[] for _ in range(jax.process_count())]
    for device, (rows, _) in places.items():
        held[device.process_index] += rows.indices(config.batch_size)[:2]
    return [range(min(ends), max(ends)) for ends in held]


def flops_per_token(model: Decoder) -> float:
    """Forward and backward FLOPs: 6 per parameter of the matrices. Attention scores are left out,
    and so is an embedding that is only looked up."""
    matrices = sum(x.size for x in jax.tree.leaves(model) if x.ndim >= 2)
    looked_up = 0 if model.head is None else sum(x.size for x in jax.tree.leaves(model.embedding))
    return 6.0 * (matrices - looked_up)


def _load_tokenizer(config: Config) -> Tokenizer:
    if not config.data.tokenizer:
        raise UserError(
            f"{config.name} has a vocabulary of {config.model.vocab} and no tokenizer: give "
            "--config.data.tokenizer=PATH/tokenizer.json and a corpus in --config.data.sources"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab > config.model.vocab:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab} tokens, the model's vocabulary "
            f"{config.model.vocab}: set --config.model.vocab={tokenizer.vocab} or more"
        )
    return tokenizer


def _check_sizes(config: Config) -> None:
    sizes = {n: getattr(config, n) for n in ("steps", "batch_size", "seq_len", "accumulate")}
    sizes["log_every"] = config.log_every
    sizes |= {f"{n}.every": getattr(config, n).every for n in ("checkpoint", "evaluation")}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"config.{name} is {size}: it must be at least 1")
    parts = config.accumulate * ways("batch")
    replicable = config.accumulate == 1  # at the price of idle devices
    if config.batch_size % parts and not replicable:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by accumulate x devices along the "
            f"batch = {parts}: use a multiple of that"
        )


def source_of(init_from: str) -> tuple[str, int | None]:
    """(workdir, step) of `workdir[@step]`."""
    workdir, at, step = init_from.rpartition("@")
    return (workdir, int(step)) if at and step.isdigit() else (init_from, None)


@jax.jit
def _all_finite(tree: Any) -> Bool[Array, ""]:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def _not_finite(fault: str, checkpoints: Checkpoints) -> UserError:
    checkpoints.wait()
    last = checkpoints.latest
    good = (
        "there is no checkpoint" if last is None else f"the last good checkpoint is at step {last}"
    )
    return UserError(f"{fault}; {good}: lower the learning rate or look at the data there")


def _check_length(config: Config, previous: dict[str, Any], step: int) -> None:
    old = previous["steps"]
    if old != config.steps and not may_change_steps(config.optimizer, old, step):
        raise UserError(
            f"steps was {old} and is {config.steps}: the {config.optimizer.schedule} schedule has "
            "already used the old length; choose another workdir"
        )


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_string("workdir", None, "where the run lives; default: runs/NAME")
    command.run(main, preemptible=True)
