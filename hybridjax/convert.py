"""Converts checkpoints: between Hugging Face directories and work directories.

    python -m hybridjax.convert --workdir=runs/qwen3 --import_from=PATH/Qwen3-1.7B
    python -m hybridjax.convert --workdir=runs/hypenet-2b --export_to=PATH/HypeNet-2B

An imported work directory can be measured, talked to and exported, and other runs can start from it
(`config.init_from`). Its parameters are f32; so is what is exported, unless `--dtype=bfloat16`.
"""

import dataclasses
import pathlib
import shutil

import jax
from absl import flags
from jax.experimental import multihost_utils

from hybridjax import command, huggingface
from hybridjax.checkpoint import Checkpoints
from hybridjax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    UserError,
)
from hybridjax.data.tokenizer import load_tokenizer
from hybridjax.files import read_json
from hybridjax.sharding import make_mesh
from hybridjax.workdir import check_owner, claim, open_run

CARRIED = "huggingface"  # in a work directory: config.json and tokenizer as they came


def main() -> None:
    given = flags.FLAGS
    if given.workdir is None or (given.import_from is None) == (given.export_to is None):
        raise UserError("give --workdir=DIR, and --import_from=DIR or --export_to=DIR")
    workdir = pathlib.Path(given.workdir)
    if given.import_from:
        source = pathlib.Path(given.import_from)
        import_directory(source, workdir, given.tokenizer, given.seq_len)
    else:
        export_run(workdir, pathlib.Path(given.export_to), given.dtype, int(given.shard_gb * 1e9))


def import_directory(
    source: pathlib.Path, workdir: pathlib.Path, tokenizer: str | None, seq_len: int
) -> None:
    """A work directory with the model as its checkpoint 0."""
    pretrained = huggingface.open_directory(source)
    config = config_of(pretrained, workdir, tokenizer, seq_len)
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} has checkpoints already: choose another --workdir")
    check_owner(workdir, dataclasses.asdict(config))
    jax.set_mesh(make_mesh(config.mesh))
    model = pretrained.load()
    multihost_utils.sync_global_devices("the model is read")  # till here nothing was written

    if jax.process_index() == 0:
        huggingface.copy_companions(source, workdir / CARRIED)
        shutil.copyfile(source / huggingface.SETTINGS, workdir / CARRIED / huggingface.SETTINGS)
    claim(workdir, dataclasses.asdict(config))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"model": model}, metadata={"logit_base": pretrained.logit_base})
    checkpoints.close()
    size = sum(x.size for x in jax.tree.leaves(model))
    print(f"{source} -> {workdir}: {pretrained.family.architecture}, {size:,} parameters")


def config_of(
    pretrained: huggingface.Pretrained, workdir: pathlib.Path, tokenizer: str | None, seq_len: int
) -> Config:
    """The configuration of an imported work directory; nothing was trained, so it has no data."""
    source, model = pretrained.directory, pretrained.model
    if tokenizer is None and not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json: give --tokenizer=PATH, or bytes")
    found = load_tokenizer(tokenizer or str(source))
    if found.vocab > model.vocab:
        raise UserError(
            f"the tokenizer {found.name} has {found.vocab} tokens, the model {model.vocab}: give "
            "its own with --tokenizer=PATH"
        )
    base = pretrained.logit_base
    return Config(
        name=workdir.name,
        model=model,
        data=DataConfig(tokenizer=tokenizer or str(workdir / CARRIED), sources={}),
        optimizer=OptimizerConfig(),
        steps=0,
        batch_size=1,
        seq_len=seq_len,
        evaluation=EvaluationConfig(logit_bases=() if base is None else (base,)),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def export_run(workdir: pathlib.Path, target: pathlib.Path, dtype: str, shard_bytes: int) -> None:
    """The newest checkpoint of a run, its tokenizer, and what else it was imported with."""
    run = open_run(workdir)
    carried = read_json(workdir / CARRIED / huggingface.SETTINGS) or dict(
        max_position_embeddings=run.config.seq_len, eos_token_id=run.tokenizer.eos
    )
    family = huggingface.save_directory(
        target, run.config.model, run.model, logit_base=run.logit_base, settings=carried,
        dtype=dtype, shard_bytes=shard_bytes,
    )  # fmt: skip
    if jax.process_index() == 0 and run.config.data.tokenizer != "bytes":
        huggingface.copy_companions(run.config.data.tokenizer, target)
    print(f"{workdir}, step {run.step} -> {target}: {family.architecture}")
    if run.logit_base is not None and family.logit_base is None:
        print(f"{family.architecture} knows no log scaling: its base {run.logit_base:g} is lost")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the work directory to write or to read")
    flags.DEFINE_string("import_from", None, "a Hugging Face directory")
    flags.DEFINE_string("export_to", None, "a directory to be made in Hugging Face's form")
    flags.DEFINE_string("tokenizer", None, "of an import, if not the directory's own; or bytes")
    flags.DEFINE_integer("seq_len", 4096, "from which evaluation counts its lengths", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(huggingface.DTYPES), "of an export")
    flags.DEFINE_float("shard_gb", 5.0, "the largest file of an export", lower_bound=1e-6)
    command.run(main)
