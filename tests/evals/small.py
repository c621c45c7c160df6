"""Decoders over bytes, as small as they can be, with weights that prefer nothing."""

import functools

import jax
from ml_collections import ConfigDict

from hybridjax.config import ModelConfig, typed
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder

HEADS, FFN = dict(heads=2, head_dim=8), mlp("swiglu", hidden=16)
MEMORY = dict(chunk_size=8, kv_heads=1, head_dim=8, landmark_dim=4, encoder_heads=2, hidden=16)
WINDOW = mixer("attention", window=12, rope=True, **HEADS)
READ = mixer("hsa", **HEADS)
LEGEND = dict(
    A=block(mixer("attention", rope=True, **HEADS), mlp=FFN),
    S=block(WINDOW, mlp=FFN),
    E=block(mixer("chunk_encoder", **MEMORY)),
    H=block(
        WINDOW, mixer("retrieval", groups=1, landmark_dim=4, top_k=2, norm=True), READ,
        mlp=FFN, residual="bypass",
    ),
    h=block(READ, mlp=FFN),
)  # fmt: skip


@functools.cache
def decoder(layers: str) -> Decoder:
    config = dict(layers=layers, blocks=LEGEND, width=16, vocab=256, embedding_std=1.0)
    return jax.jit(lambda: Decoder(typed(ConfigDict(config), ModelConfig), jax.random.key(7)))()
