"""The configuration of a conversion, and the training run that each of its stages is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridjax.config import (
    BlockConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    UserError,
)

CLIPS = ("layer", "global")
GATES = ("preserving", "fresh")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    steps: int
    batch_size: int
    seq_len: int
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class AlignConfig(StageConfig):
    clip: str = "layer"  # each layer's gradient by its own norm | global: all by one, as published


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    rule: str = "halo"  # one of selection.RULES
    keep: int = 0  # layers that stay attention; 0: a quarter of them, as published
    layers: str = ""  # the choice made by hand: A or L for each layer
    eps: float = 1e-10  # of the official code; the paper's equation 8 has 1e-6
    cap: float = 50.0  # of the official code; the paper has none (inf)
    examples: int = 512  # needle tests per layer
    tokens: int = 32768  # of text per layer
    recall: tuple[str, ...] = ()  # lm-evaluation-harness tasks in place of the needle tests
    commonsense: tuple[str, ...] = ()  # and in place of the next tokens of text
    task_folder: str = ""  # where yaml files of further such tasks are


@dataclasses.dataclass(frozen=True)
class HaloConfig:
    name: str  # of the run: names its default work directory
    linear: Mapping[str, Any]  # spec of the mixer that replaces attention
    data: DataConfig
    align: AlignConfig
    distill: StageConfig
    finetune: StageConfig
    select: SelectConfig = SelectConfig()
    teacher: str = ""  # a run's work directory, optionally `@step`; "": one is trained here
    model: ModelConfig | None = None  # of the teacher that is trained here, or is only compiled
    pretrain: StageConfig | None = None  # and how
    attention: Mapping[str, Any] = dataclasses.field(  # what changes in the layers that stay
        default_factory=lambda: dict(rope=False, gate=True)
    )
    gates: str = "fresh"  # preserving: gates start at 1/2, and outputs doubled, so nothing changes
    remat: str = ""  # of the hybrid; "": the teacher's
    seed: int = 0
    log_every: int = 50  # steps
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def run_config(halo: HaloConfig, stage: str, model: ModelConfig, init_from: str = "") -> Config:
    """The run that a stage is. Each stage reads data of its own, by a seed of its own."""
    names = ("pretrain", "align", "distill", "finetune")
    own = {f.name: getattr(getattr(halo, stage), f.name) for f in dataclasses.fields(StageConfig)}
    return Config(
        name=f"{halo.name}-{stage}",
        model=model,
        data=halo.data,
        seed=halo.seed + 1000 * names.index(stage),
        log_every=halo.log_every,
        init_from=init_from,
        mesh=halo.mesh,
        checkpoint=halo.checkpoint,
        evaluation=halo.evaluation,
        **own,
    )


# ---------------------------------------------------------------- the stacks


def check_teacher(halo: HaloConfig, teacher: ModelConfig) -> None:
    """Raises `UserError` for a teacher that cannot be converted to what is asked for."""
    for name, known in (("align.clip", CLIPS), ("gates", GATES)):
        value = halo.align.clip if name == "align.clip" else halo.gates
        if value not in known:
            raise UserError(f"config.{name} is {value!r}: use one of {', '.join(known)}")
    block = teacher.blocks[teacher.layers[0]]
    if len(set(teacher.layers)) > 1 or [m["type"] for m in block.mixers] != ["attention"]:
        raise UserError(
            f"the teacher's stack is {teacher.layers}: HALO converts a stack of one letter, whose "
            "block has one mixer, attention"
        )
    attention = block.mixers[0]
    for option in ("heads", "head_dim"):
        there, here = attention[option], halo.linear.get(option, attention[option])
        if there != here:
            raise UserError(
                f"config.linear.{option} is {here} and the teacher has {there}: set "
                f"--config.linear.{option}={there}"
            )


def check_stack(layers: str, depth: int) -> str:
    """A choice made by hand, with a letter for each of the teacher's layers."""
    if len(layers) != depth or set(layers) - set("AL"):
        raise UserError(
            f"config.select.layers is {layers!r}: give {depth} letters, A (attention) or L (linear)"
        )
    return layers


def student_config(halo: HaloConfig, teacher: ModelConfig, layers: str) -> ModelConfig:
    """The hybrid: `A` for the attention that stays, `L` for the linear mixer."""
    block = teacher.blocks[teacher.layers[0]]
    kept = {**block.mixers[0], **halo.attention}
    return dataclasses.replace(
        teacher,
        layers=layers,
        blocks={"A": _with_mixer(block, kept), "L": _with_mixer(block, halo.linear)},
        remat=halo.remat or teacher.remat,
    )


def choice_config(halo: HaloConfig, teacher: ModelConfig) -> ModelConfig:
    """Both mixers in every layer: option 0 is the teacher's attention, 1 the linear mixer."""
    letter = teacher.layers[0]
    block = teacher.blocks[letter]
    choice = {"type": "choice", "options": (block.mixers[0], halo.linear)}
    return dataclasses.replace(teacher, blocks={letter: _with_mixer(block, choice)})


def _with_mixer(block: BlockConfig, mixer: Mapping[str, Any]) -> BlockConfig:
    return dataclasses.replace(block, mixers=(dict(mixer),))
