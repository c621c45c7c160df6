"""Small models with weights under their published names, stored [out, in].

The names are those of Qwen3 in `transformers`, and those that HypeNet's code
(thunlp/hybrid-linear-attention) adds to them.
"""

import dataclasses

import numpy as np

from hybridjax.config import ModelConfig, typed
from hybridjax.huggingface import family_of, weights
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a test's model. The linear layers of HypeNet have as many K/V heads as query heads."""

    layers: str  # Q: Qwen3's layer; A, L: HypeNet's
    width: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 40
    vocab: int = 48
    theta: float = 1e4
    tied: bool = True

    def model(self) -> ModelConfig:
        shape = dict(heads=self.heads, head_dim=self.head_dim)
        attention = dict(shape, kv_heads=self.kv_heads)
        mixers = {
            "Q": mixer("attention", rope=True, theta=self.theta, gate=False, **attention),
            "A": mixer("attention", **attention),
            "L": mixer("lightning", theta=self.theta, **shape),
        }
        ffn = mlp("swiglu", hidden=self.hidden)
        config = dict(
            layers=self.layers,
            blocks={c: block(mixers[c], mlp=ffn) for c in dict.fromkeys(self.layers)},
            width=self.width,
            vocab=self.vocab,
            tied=self.tied,
        )
        return typed(config, ModelConfig)


def decoder_with(config: ModelConfig, named: dict[str, np.ndarray]) -> Decoder:
    """The decoder whose parameters are exactly these weights, in f32."""
    return weights.load(config, family_of(config), named)


def weights_of(config: ModelConfig, decoder: Decoder) -> dict[str, np.ndarray]:
    """The inverse of `decoder_with`."""
    return dict(weights.tensors_of(config, family_of(config), decoder))


def random_weights(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights for every parameter; those of norms differ from one, so that none can be missed."""
    shapes = weights.shapes(config, family_of(config))
    return {name: random_weight(shape, rng) for name, shape in shapes.items()}


def random_weight(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Exact in f16, in which the golden files store them."""
    if len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.normal(size=shape) / np.sqrt(shape[1])
    return value.astype(np.float16).astype(np.float32)
