"""A config file for tests: hypenet's tiny preset, small enough to train in seconds."""

import grain
import numpy as np
from ml_collections import ConfigDict

from configs import hypenet
from hybridjax.config import choose
from hybridjax.data.sources import encode, text_document
from hybridjax.data.text import documents


def micro() -> ConfigDict:
    """The three intervals and the number of steps have no common divisor."""
    config = hypenet.tiny()
    for block in config.model.blocks.values():
        block.mixers[0].update(heads=2, head_dim=8)
        block.mlp.hidden = 32
    config.name = "test"
    config.model.width = 16
    config.optimizer.update(name="adamw", warmup_steps=2)
    config.update(steps=7, batch_size=4, seq_len=32, log_every=2)
    config.checkpoint.every = 3
    config.evaluation = ConfigDict(
        dict(every=4, heldout_tokens=256, lengths=(1,), facts=(1,), examples=10, logit_bases=())
    )
    return config


def constant() -> ConfigDict:
    config = micro()
    config.optimizer.schedule = "constant"
    config.optimizer.frozen = ("embedding",)
    return config


def get_config(arg: str | None = None) -> ConfigDict:
    return choose(arg, {"micro": micro, "constant": constant})


class Snippets:
    """Documents of 3 to 40 bytes of the embedded text, of which the last four are to be learnt."""

    def __init__(self, tokenizer, seq_len, split, seed):
        ids = encode(tokenizer, documents(split)[0])
        ends = np.cumsum(np.random.default_rng(seed).integers(3, 41, size=200))
        self.documents = [text_document(part) for part in np.split(ids, ends)[:-1]]
        for document in self.documents:
            document["loss_weights"][:-4] = 0

    def dataset(self, shard=slice(None)):
        return grain.MapDataset.source(self.documents)[shard]
