"""A config file for tests: the tiny conversion, small enough to run in seconds."""

from ml_collections import ConfigDict

from configs import halo
from hybridjax.config import choose
from hybridjax.halo.config import HaloConfig


def micro() -> ConfigDict:
    config = halo.tiny()
    config.name = "test"
    config.model.update(width=16, layers="TT")
    config.model.blocks.T.mixers[0].update(heads=2, kv_heads=1, head_dim=8)
    config.model.blocks.T.mlp.hidden = 32
    config.linear.update(heads=2, head_dim=8)
    for stage in ("pretrain", "align", "distill", "finetune"):
        config[stage].update(steps=5, batch_size=4, seq_len=32)
        config[stage].optimizer.update(name="adamw", warmup_steps=2)
    config.update(log_every=2, select=dict(examples=8, tokens=256))
    config.checkpoint.every = 3
    config.evaluation = ConfigDict(
        dict(every=50, heldout_tokens=256, lengths=(1,), facts=(1,), examples=10, task={})
    )
    return config


def get_config(arg: str | None = None) -> ConfigDict:
    return choose(arg, {"micro": micro}, cls=HaloConfig)
