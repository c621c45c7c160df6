"""A teacher and its linear mixers, small enough to be made in a second."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from micro_halo import get_config

from hybridjax.config import typed
from hybridjax.halo import transfer
from hybridjax.halo.config import HaloConfig
from hybridjax.models import mixer
from hybridjax.models.decoder import Decoder


def conversion(layers: str = "TT", linear: str = "lightning", **changes) -> HaloConfig:
    """Grouped attention of four heads; further changes are of the conversion itself."""
    config = get_config()
    config.model.layers = layers
    config.model.blocks.T.mixers[0].update(heads=4, kv_heads=2)
    shape = dict(kv_heads=2, rope=True, gate=False) if linear == "attention" else {}
    config.linear = mixer(linear, heads=4, head_dim=8, **shape)
    config.update(changes)
    return typed(config, HaloConfig)


def teacher_of(halo: HaloConfig) -> Decoder:
    return jax.jit(lambda: Decoder(halo.model, jax.random.key(0)))()


def mixers_of(halo: HaloConfig, teacher: Decoder):
    return jax.jit(functools.partial(transfer.linear_mixers, halo))(teacher)


def batch_of(rng, batch=2, length=16, vocab=256) -> dict:
    """Two documents in each row, and padding."""
    tokens = rng.integers(vocab, size=(batch, length + 1)).astype(np.int32)
    segments = np.repeat([1, 2, 0], [6, length - 8, 2])[None].repeat(batch, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (6, length - 8, 2)])[None].repeat(batch, 0)
    arrays = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=segments,
        positions=positions.astype(np.int32),
        answers=np.zeros_like(segments),
        loss_weights=(segments > 0).astype(np.float32),
    )
    return {name: jnp.asarray(x) for name, x in arrays.items()}
