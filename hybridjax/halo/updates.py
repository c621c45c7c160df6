"""One update of the stages that have a teacher: no data, no disk."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from hybridjax import train
from hybridjax.config import Config, ModelConfig
from hybridjax.halo.alignment import alignment_gradients, alignment_optimizer
from hybridjax.halo.config import HaloConfig, run_config, student_config
from hybridjax.halo.distillation import distillation_sums
from hybridjax.mixers.base import Mixer
from hybridjax.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Update:
    """`step(state, batch, teacher) -> (state, scalars)`, jitted, and what it is made of."""

    config: Config
    optimizer: optax.GradientTransformation
    step: Callable

    def first_state(self, model) -> train.TrainState:
        return train.first_state(model, self.optimizer)


def alignment(halo: HaloConfig, teacher: ModelConfig, mixers: Mixer) -> Update:
    """Of the stacked linear mixers, which may be shapes."""
    config = run_config(halo, "align", teacher)
    optimizer = alignment_optimizer(halo.align, len(teacher.layers), mixers)
    step = train.make_train_step(optimizer, config, alignment_gradients)
    return Update(config, optimizer, step)


def distillation(halo: HaloConfig, teacher: ModelConfig, layers: str) -> Update:
    """Of the hybrid `layers`."""
    config = run_config(halo, "distill", student_config(halo, teacher, layers))
    student = jax.eval_shape(lambda: train.new_model(config))
    optimizer = make_optimizer(config.optimizer, config.steps, student)
    step = train.make_train_step(optimizer, config, train.gradients_of(distillation_sums))
    return Update(config, optimizer, step)
