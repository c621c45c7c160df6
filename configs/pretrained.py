"""Trains a pretrained model on: `DIR` is a Hugging Face directory or a work directory.

    python -m hybridjax.train --config=configs/pretrained.py:PATH/Qwen3-1.7B \\
        --config.data.sources.text.path='corpus/*.parquet'

The model and the tokenizer are those of the directory; further settings follow it as
`:DIR,model.remat=full,steps=100`.
"""

import pathlib

from ml_collections import ConfigDict

from hybridjax.config import Config, ModelConfig, UserError, choose, typed
from hybridjax.data.sources import source
from hybridjax.huggingface import is_huggingface, open_directory
from hybridjax.models import block, mixer, mlp
from hybridjax.workdir import load_config


def get_config(arg: str | None = None) -> ConfigDict:
    directory, *changes = (arg or "").split(",")
    if not directory:
        raise UserError("no directory: give --config=configs/pretrained.py:DIR")
    name = pathlib.Path(directory).name
    return choose(",".join([name, *changes]), {name: lambda: tuned(directory)})


def tuned(directory: str) -> ConfigDict:
    if is_huggingface(directory):
        model, tokenizer = open_directory(directory).model, directory
    else:
        run = typed(load_config(directory), Config)
        model, tokenizer = run.model, run.data.tokenizer
    return ConfigDict(
        dict(
            name="tuned",
            init_from=directory,
            model=_words(model),
            data=dict(
                tokenizer=tokenizer,
                sources=dict(text=source("parquet", path="corpus/*.parquet")),
            ),
            optimizer=dict(learning_rate=1e-5, schedule="wsd", warmup_steps=50),
            steps=500,
            batch_size=16,
            seq_len=4096,
            mesh=dict(data=1, fsdp=-1),
        )
    )


def _words(model: ModelConfig) -> dict:
    """The model in the words of a config file, so that every part of it can be overridden."""
    legend = {
        letter: block(
            *(mixer(**spec) for spec in b.mixers),
            mlp=None if b.mlp is None else mlp(**b.mlp),
            residual=b.residual,
            norms=b.norms,
            scale=b.scale,
        )
        for letter, b in model.blocks.items()
    }
    return vars(model) | dict(blocks=legend, remat="names")
