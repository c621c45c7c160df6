"""The stages of a conversion as programs: alignment, distillation and finetuning."""

import dataclasses

import jax

from hybridjax.aot.program import Program, batch_of, bodies, placed, train_program
from hybridjax.config import Config, ModelConfig, UserError, typed
from hybridjax.halo import selection, transfer, updates
from hybridjax.halo.config import (
    HaloConfig,
    check_stack,
    check_teacher,
    run_config,
    student_config,
)
from hybridjax.train import new_model, source_of
from hybridjax.workdir import load_config

STAGES = ("align", "distill", "finetune")


def teacher_of(halo: HaloConfig) -> ModelConfig:
    """The teacher's shape: of the run that is named, or of the preset."""
    if halo.teacher:
        return typed(load_config(source_of(halo.teacher)[0])).model
    if halo.model is None:
        raise UserError(f"{halo.name} has no teacher: give --config.teacher=WORKDIR")
    return halo.model


def stack_of(halo: HaloConfig, teacher: ModelConfig) -> str:
    """The hybrid that was chosen by hand; else one with as much attention, evenly spaced."""
    depth = len(teacher.layers)
    if halo.select.layers:
        return check_stack(halo.select.layers, depth)
    kept = selection.evenly(depth, halo.select.keep or max(1, depth // 4))
    return "".join("LA"[i in kept] for i in range(depth))


def config_of(halo: HaloConfig, stage: str) -> Config:
    """The run that a stage is; its model is what is trained, for alignment the teacher."""
    if stage not in STAGES:
        raise UserError(f"{halo.name} is a conversion: give --program={'|'.join(STAGES)}")
    teacher = teacher_of(halo)
    check_teacher(halo, teacher)
    student = student_config(halo, teacher, stack_of(halo, teacher))
    return run_config(halo, stage, teacher if stage == "align" else student)


def trace(halo: HaloConfig, mesh, stage: str) -> Program:
    """One update of a stage, traced for a mesh."""
    config, shape = config_of(halo, stage), teacher_of(halo)
    with jax.set_mesh(mesh):
        if stage == "finetune":
            return dataclasses.replace(train_program(config, mesh), name=stage)
        batch = batch_of(config, mesh)
        teacher = placed(jax.eval_shape(lambda: new_model(run_config(halo, stage, shape))), mesh)
        if stage == "align":
            start = lambda teacher: transfer.linear_mixers(halo, teacher)
            update = updates.alignment(halo, shape, jax.eval_shape(start, teacher))
        else:
            start = lambda teacher: new_model(config)
            update = updates.distillation(halo, shape, config.model.layers)
        first = jax.jit(lambda teacher: update.first_state(start(teacher)))
        state = placed(first.eval_shape(teacher), mesh)
        traced = update.step.trace(state, batch, teacher)
    parts = {"parameters": state.model, "optimizer": state.opt_state, "teacher": teacher}
    compiled = bodies(teacher) + (bodies(state.model) if stage == "distill" else 0)
    tokens = config.batch_size * config.seq_len
    return Program(stage, traced, parts | {"batch": batch}, tokens, compiled)


def forward_passes(halo: HaloConfig, stage: str) -> list[tuple[ModelConfig, bool]]:
    """The models that a stage runs, and whether backward too; without the mixers that are
    aligned."""
    config, teacher = config_of(halo, stage), (teacher_of(halo), False)
    return {
        "align": [teacher],
        "distill": [(config.model, True), teacher],
        "finetune": [(config.model, True)],
    }[stage]


def in_its_words(advice: str, stage: str) -> str:
    """Advice about a run's settings, about the conversion's."""
    advice = advice.replace("--config.accumulate=", f"--config.{stage}.accumulate=")
    return advice.replace("--config.model.remat=", "--config.remat=")
