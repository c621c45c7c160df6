"""The stages of a conversion, each of which reads what the ones before have left on disk.

    workdir/teacher/    a run, where the teacher is trained here
    workdir/transfer/   linear mixers with what they inherit
    workdir/align/      the same, aligned
    workdir/select/     scores.json: every model of the sweep, every rule's choice, the stack
    workdir/distill/    a run: the hybrid
    workdir/finetune/   a run: the hybrid, at its long context

A stage that was interrupted goes on where it was, and one that is done is not done again.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridjax import processes, train
from hybridjax.checkpoint import Checkpoints, latest_step, restore_model
from hybridjax.config import Config, UserError, typed
from hybridjax.data.tokenizer import load_tokenizer
from hybridjax.files import read_json, write_json
from hybridjax.halo import selection, transfer, updates
from hybridjax.halo.config import HaloConfig, check_stack, check_teacher, run_config
from hybridjax.mixers.base import Mixer
from hybridjax.models.decoder import Decoder
from hybridjax.workdir import hold, load_config


@dataclasses.dataclass(frozen=True)
class Teacher:
    config: Config
    model: Decoder


def pretrain(halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """Trains a teacher, where none is given."""
    if halo.teacher:
        return True
    if halo.model is None or halo.pretrain is None:
        raise UserError(
            f"{halo.name} converts a pretrained Transformer: give --config.teacher=WORKDIR"
        )
    return train.train(run_config(halo, "pretrain", halo.model), workdir / "teacher")


def transfer_weights(halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """A linear mixer for each layer, with what it inherits from the teacher's attention."""
    checkpoints = Checkpoints(workdir / "transfer")
    if checkpoints.latest is None:
        teacher = load_teacher(halo, workdir)
        mixers = jax.jit(functools.partial(transfer.linear_mixers, halo))(teacher.model)
        checkpoints.save(0, {"model": mixers})
    checkpoints.close()
    return True


def align(halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """Stage 1: the linear mixers learn what the teacher's attention gives."""
    teacher = load_teacher(halo, workdir)
    abstract = abstract_mixers(halo, teacher)
    update = updates.alignment(halo, teacher.config.model, abstract)
    first = jax.jit(update.first_state)
    return train.fit(
        update.config,
        workdir / "align",
        lambda state, batch: update.step(state, _every_token(batch), teacher.model),
        lambda: first(load_mixers(halo, workdir, "transfer", teacher)),
        first.eval_shape(abstract),
        align=max(teacher.model.align, abstract.align),
        flops=train.flops_per_token(teacher.model) / 3 + _flops(abstract),
    )


def select(halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """Measures the models of the sweep, and chooses the layers that stay attention."""
    path = workdir / "select" / "scores.json"
    found = read_json(path) or {}
    if "layers" in found:
        return True
    teacher = load_teacher(halo, workdir)
    depth = len(teacher.config.model.layers)
    if halo.select.layers:
        layers = check_stack(halo.select.layers, depth)
        _write(path, {"rule": "by hand", "layers": layers})
        return True
    if halo.select.rule not in selection.RULES:
        known = ", ".join(selection.RULES)
        raise UserError(f"config.select.rule is {halo.select.rule!r}: use one of {known}")
    keep = halo.select.keep or max(1, depth // 4)

    mixers = load_mixers(halo, workdir, "align", teacher)
    build = functools.partial(transfer.choices, halo, teacher.config.model)
    model = jax.jit(build)(teacher.model, mixers)
    questions = selection.Questions.of(
        halo.select,
        load_tokenizer(halo.data.tokenizer),
        teacher.config.seq_len,
        halo.evaluation.facts[0],
        halo.evaluation.task,
    )
    ask = lambda chosen: dataclasses.asdict(selection.measure(model, chosen, questions))
    ask_tasks = _asking_tasks(halo, teacher, mixers)
    rows = found.get("models", {})
    if not _sweep(path, rows, depth, lambda chosen: ask(chosen) | ask_tasks(chosen)):
        return False
    measured = {name: selection.Measured(**row) for name, row in rows.items()}
    scores = selection.scores_of_rules(measured, depth, keep, halo.select)
    kept = scores["kept"][halo.select.rule]
    layers = "".join("LA"[i in kept] for i in range(depth))
    _write(path, {"models": rows, **scores, "rule": halo.select.rule, "layers": layers})
    return True


def _asking_tasks(
    halo: HaloConfig, teacher: Teacher, mixers: Mixer
) -> Callable[[tuple[int, ...]], dict[str, float]]:
    """For a model of the sweep what is measured by tasks of lm-evaluation-harness. Since these
    generate too, each model is one of its own, and compiled."""
    asked = {"recall": halo.select.recall, "commonsense": halo.select.commonsense}
    if not any(asked.values()):
        return lambda chosen: {}
    from hybridjax.evals import harness  # an extra

    names = [name for group in asked.values() for name in group]
    tasks = harness.Tasks(names, halo.select.task_folder)
    tokenizer = load_tokenizer(halo.data.tokenizer)

    def ask(chosen: tuple[int, ...]) -> dict[str, float]:
        layers = "".join("AL"[option] for option in chosen)
        build = functools.partial(transfer.swapped, halo, teacher.config.model, layers)
        model = jax.jit(build)(teacher.model, mixers)
        results = tasks.measure(harness.HarnessModel(model, tokenizer))
        return {kind: harness.mean_score(results, own) for kind, own in asked.items() if own}

    return ask


def _sweep(
    path: pathlib.Path,
    rows: dict[str, Any],
    depth: int,
    ask: Callable[[tuple[int, ...]], dict[str, float]],
) -> bool:
    """Measures the models that `rows` lacks, writing each down; False where asked to stop."""
    stop = processes.StopRequest()
    try:
        for number, (name, chosen) in enumerate(selection.sweep(depth).items()):
            if stop.at(number):
                if jax.process_index() == 0:
                    print(f"stopped before the model {name!r}; the same command resumes")
                return False
            if name not in rows:
                rows[name] = ask(chosen)
                _write(path, {"models": rows})
        return True
    finally:
        stop.close()


def distill(halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """Stage 2: the hybrid's predictions become the teacher's."""
    teacher, layers = load_teacher(halo, workdir), selected(workdir)
    update = updates.distillation(halo, teacher.config.model, layers)
    abstract = jax.eval_shape(lambda: train.new_model(update.config))

    @jax.jit
    def first(teacher_model, mixers):
        student = transfer.student(halo, teacher.config.model, layers, teacher_model, mixers)
        return update.first_state(student)

    return train.fit(
        update.config,
        workdir / "distill",
        lambda state, batch: update.step(state, _every_token(batch), teacher.model),
        lambda: first(teacher.model, load_mixers(halo, workdir, "align", teacher)),
        first.eval_shape(teacher.model, abstract_mixers(halo, teacher)),
        align=max(teacher.model.align, abstract.align),
        flops=train.flops_per_token(abstract) + train.flops_per_token(teacher.model) / 3,
    )


def finetune(halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """Stage 3: next-token cross-entropy at the long context; an ordinary run."""
    _finished(halo, workdir, "distill")
    model = typed(load_config(workdir / "distill")).model
    config = run_config(halo, "finetune", model, init_from=str(workdir / "distill"))
    return train.train(config, workdir / "finetune")


STAGES = {
    "transfer": transfer_weights,
    "align": align,
    "select": select,
    "distill": distill,
    "finetune": finetune,
}


def run(stages: list[str], halo: HaloConfig, workdir: pathlib.Path) -> bool:
    """Whether all of these stages came to their ends."""
    for name in stages:
        if name not in STAGES:
            raise UserError(f"there is no stage {name!r}: there are {', '.join(STAGES)}")
    with hold(workdir):
        wanted = pretrain, *(STAGES[name] for name in stages)
        return all(stage(halo, workdir) for stage in wanted)


# ---------------------------------------------------------------- what earlier stages have left


def teacher_source(halo: HaloConfig, workdir: pathlib.Path) -> tuple[str, int | None]:
    """The teacher's work directory, and its step where one is named."""
    return train.source_of(halo.teacher or str(workdir / "teacher"))


def load_teacher(halo: HaloConfig, workdir: pathlib.Path) -> Teacher:
    """The teacher as it was trained, on the mesh that is set."""
    source, step = teacher_source(halo, workdir)
    config = typed(load_config(source))
    check_teacher(halo, config.model)
    _check_tokenizer(halo.data.tokenizer, config.data.tokenizer)
    model, _, _ = restore_model(source, _abstract(lambda: train.new_model(config)), step)
    return Teacher(config, model)


def _check_tokenizer(ours: str, teachers: str) -> None:
    if not ours or not teachers or ours == teachers:  # "": not said yet, or never known
        return
    if load_tokenizer(ours).fingerprint != load_tokenizer(teachers).fingerprint:
        raise UserError(
            f"config.data.tokenizer is {ours!r} and the teacher's is {teachers!r}, which gives "
            f"other ids: set --config.data.tokenizer={teachers}"
        )


def load_mixers(halo: HaloConfig, workdir: pathlib.Path, stage: str, teacher: Teacher) -> Mixer:
    _finished(halo, workdir, stage)
    return restore_model(workdir / stage, abstract_mixers(halo, teacher))[0]


def abstract_mixers(halo: HaloConfig, teacher: Teacher) -> Mixer:
    return _abstract(functools.partial(transfer.linear_mixers, halo), teacher.model)


def selected(workdir: pathlib.Path) -> str:
    """The stack that was chosen."""
    found = read_json(workdir / "select" / "scores.json") or {}
    if "layers" not in found:
        raise UserError(f"no layers are selected in {workdir}: run --stages=select first")
    return found["layers"]


def _finished(halo: HaloConfig, workdir: pathlib.Path, stage: str) -> None:
    steps = 0 if stage == "transfer" else getattr(halo, stage).steps
    at = latest_step(workdir / stage)
    if at != steps:
        state = "was not run" if at is None else f"is at step {at} of {steps}"
        raise UserError(f"stage {stage} {state} in {workdir}: run --stages={stage} first")


# ---------------------------------------------------------------- small matters


def _abstract(f, *args) -> Any:
    return jax.jit(f).eval_shape(*args)


def _every_token(batch: train.Batch) -> train.Batch:
    """The batch with every real token weighing the same."""
    return batch | {"loss_weights": (batch["segments"] > 0).astype(jnp.float32)}


def _flops(mixers: Mixer) -> float:
    return 6.0 * sum(x.size for x in jax.tree.leaves(mixers) if x.ndim >= 3)  # stacked matrices


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_json(path, value)
