"""Decoders with the weights of published models, which have names and are stored [out, in].

`model.layers.0.self_attn.q_proj.weight` and its like: the names of Qwen3 in `transformers`, and
those that HypeNet's code (thunlp/hybrid-linear-attention) adds to them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridjax.config import ModelConfig, typed
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder

_TOP = {
    "embedding/table": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
_LAYER = {
    "norms/0/scale": "input_layernorm",
    "norms/1/scale": "post_attention_layernorm",
    "mixers/0/qkv/query/kernel": "self_attn.q_proj",
    "mixers/0/qkv/key/kernel": "self_attn.k_proj",
    "mixers/0/qkv/value/kernel": "self_attn.v_proj",
    "mixers/0/output/kernel": "self_attn.o_proj",
    "mixers/0/qkv/query_norm/scale": "self_attn.q_norm",
    "mixers/0/qkv/key_norm/scale": "self_attn.k_norm",
    "mixers/0/output_norm/scale": "self_attn.o_norm",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/output/kernel": "mlp.down_proj",
}
_GATE = {"A": "self_attn.o_gate", "L": "self_attn.z_proj"}


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
            blocks={letter: block(m, mlp=ffn) for letter, m in mixers.items()},
            width=self.width,
            vocab=self.vocab,
            tied=self.tied,
        )
        return typed(config, ModelConfig)


def decoder_with(config: ModelConfig, weights: dict[str, np.ndarray]) -> Decoder:
    """The decoder whose parameters are exactly these weights, in f32."""
    decoder = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    used = []

    def fill(path, parameter):
        path, names = _path_and_names(decoder, path)
        used.extend(names)
        values = [_transposed(path, weights[name]) for name in names]
        value = np.stack(values) if path.startswith("groups/") else values[0]
        assert value.shape == parameter.shape, (names, value.shape, parameter.shape)
        return parameter.replace(jnp.asarray(value, jnp.float32))

    filled = jax.tree.map_with_path(fill, decoder, is_leaf=_is_variable)
    assert set(used) == set(weights), set(used) ^ set(weights)
    return filled


def weights_of(decoder: Decoder) -> dict[str, np.ndarray]:
    """The inverse of `decoder_with`: by name, [out, in]."""
    weights = {}
    for path, leaf in jax.tree.leaves_with_path(decoder, is_leaf=_is_variable):
        path, names = _path_and_names(decoder, path)
        value = np.asarray(leaf[...])
        layers = value if path.startswith("groups/") else [value]
        weights |= {n: _transposed(path, x) for n, x in zip(names, layers, strict=True)}
    return weights


def random_weights(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights for every parameter; those of norms differ from one, so that none can be missed."""
    shapes = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    return {name: random_weight(x.shape, rng) for name, x in weights_of(zeros).items()}


def random_weight(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Exact in f16, in which the golden files store them."""
    if len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.normal(size=shape) / np.sqrt(shape[1])
    return value.astype(np.float16).astype(np.float32)


def _path_and_names(decoder: Decoder, path) -> tuple[str, list[str]]:
    """A parameter's path, and the published name of each of its layers (one, if not stacked)."""
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    if path in _TOP:
        return path, [_TOP[path]]
    _, g, j, part = path.split("/", 3)
    group, j = decoder.plan[int(g)], int(j)
    name = _GATE[group.pattern[j]] if part == "mixers/0/output/gate/kernel" else _LAYER[part]
    layers = range(group.start + j, group.stop, len(group.pattern))
    return path, [f"model.layers.{i}.{name}.weight" for i in layers]


def _transposed(path: str, value: np.ndarray) -> np.ndarray:
    return value.T if path.endswith("kernel") or path == "head" else value


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)
