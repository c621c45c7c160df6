"""HypeNet: attention without positions, linear layers with rotary positions (HyPE).

Paper: Hybrid Linear Attention Done Right (arXiv 2601.22156), sections 5.1, A, F; official code
and configs: thunlp/hybrid-linear-attention. Attention logits are scaled by ln(t + a) / ln(a) at
inference only; a is chosen after training, on text.

    python -m hybridjax.train --config=configs/hypenet.py                  # tiny
    python -m hybridjax.train --config=configs/hypenet.py:tiny-transformer

`tiny` and its twins train on bytes that ship with the package. The others have a vocabulary that
needs a tokenizer: `--config.data.tokenizer=PATH` and a corpus in `--config.data.sources`.
"""

from ml_collections import ConfigDict

from hybridjax.config import choose
from hybridjax.data.sources import source
from hybridjax.models import block, mixer, mlp


def get_config(arg: str | None = None) -> ConfigDict:
    return choose(arg, PRESETS)


# ---------------------------------------------------------------- tiny: minutes on a laptop


def tiny(layers: str = "LA", attention_rope: bool = False, linear_rope: bool = True) -> ConfigDict:
    heads = dict(heads=4, head_dim=32)
    ffn = mlp("swiglu", hidden=128)
    task = dict(key_length=1, value_length=2, separator="")
    return ConfigDict(
        dict(
            name="hypenet",
            model=dict(
                layers=layers,
                blocks=dict(
                    A=block(mixer("attention", rope=attention_rope, **heads), mlp=ffn),
                    L=block(mixer("lightning", rope=linear_rope, **heads), mlp=ffn),
                ),
                width=64,
                vocab=256,
                embedding_std=0.5,
                scan=False,  # a scan of few small layers costs a CPU a fifth of a step
            ),
            data=dict(
                tokenizer="bytes",
                sources=dict(facts=source("retrieval", facts=4, **task)),
            ),
            optimizer=dict(
                name="muon",
                learning_rate=0.01,
                final_learning_rate=2e-4,
                schedule="wsd",
                warmup_steps=50,
                decay_fraction=0.3,
                weight_decay=0.01,
            ),
            steps=1200,
            batch_size=16,
            seq_len=128,
            log_every=50,
            checkpoint=dict(every=400),
            evaluation=dict(
                every=400,
                facts=(4, 16),
                logit_bases=(16.0, 32.0, 64.0, 128.0, 256.0, 512.0),
                task=task,
            ),
        )
    )


def tiny_hard() -> ConfigDict:
    """The paper's 3:1 pattern at twice the length; keys of two letters, a step before the value."""
    config = tiny("LLLA")
    config.seq_len = 256
    for task in (config.data.sources.facts, config.evaluation.task):
        task.update(key_length=2, separator="=")
    return config


# ---------------------------------------------------------------- the paper's sizes


def _sized(
    width: int, hidden: int, heads: int, layers: str, vocab: int, theta: float, tied: bool
) -> ConfigDict:
    shape = dict(heads=heads, head_dim=128)
    ffn = mlp("swiglu", hidden=hidden)
    return pretraining(
        "hypenet",
        layers=layers,
        blocks=dict(
            A=block(mixer("attention", kv_heads=8, rope=False, **shape), mlp=ffn),
            L=block(mixer("lightning", rope=True, theta=theta, **shape), mlp=ffn),
        ),
        width=width,
        vocab=vocab,
        tied=tied,
    )


def pretraining(name: str, **model) -> ConfigDict:
    """A model of published size, with the recipe of the paper's models and a corpus to be named."""
    return ConfigDict(
        dict(
            name=name,
            model=dict(dtype="bfloat16", remat="names", **model),
            data=dict(tokenizer="", sources=dict(text=source("parquet", path="corpus/*.parquet"))),
            optimizer=dict(learning_rate=1e-3, schedule="wsd", warmup_steps=1000),
            steps=40_000,
            batch_size=128,
            seq_len=4096,
        )
    )


def from_scratch_500m() -> ConfigDict:
    """Section F, tables 13 and 14: 20 B tokens; the best base was 300."""
    config = _sized(1024, 3072, 16, "ALLL" * 7, 50304, 5e4, True)
    config.optimizer = ConfigDict(
        dict(
            learning_rate=5e-4,
            final_learning_rate=5e-5,
            schedule="wsd",
            warmup_steps=1000,
            weight_decay=0.1,
        )
    )
    return config


def _released(width: int, hidden: int, heads: int, depth: int, attention: set[int]) -> ConfigDict:
    """Attention layers (from 0) and tying as the released configs have them.

    9b is tied there although Qwen3-8B, its teacher, is not. 5b keeps layer 31, where the paper's
    own rule and table 7 choose 34.
    """
    layers = "".join("A" if i in attention else "L" for i in range(depth))
    return _sized(width, hidden, heads, layers, 151936, 1e6, True)


PRESETS = {
    "tiny": tiny,
    "tiny-transformer": lambda: tiny("AA", attention_rope=True),
    "tiny-nope": lambda: tiny("AA"),
    "tiny-reverse": lambda: tiny(attention_rope=True, linear_rope=False),
    "tiny-hard": tiny_hard,
    "500m": from_scratch_500m,
    "2b": lambda: _released(2048, 6144, 16, 28, {2, 3, 6, 8, 9, 21, 25}),
    "5b": lambda: _released(2560, 9728, 32, 36, {0, 1, 7, 14, 15, 22, 24, 31, 33}),
    "9b": lambda: _released(4096, 12288, 32, 36, {1, 2, 4, 6, 7, 10, 24, 33, 34}),
}
