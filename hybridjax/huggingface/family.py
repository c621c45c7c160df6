"""What a family of published models says of itself, and the words its modules share.

A family is a table from tensor names to our parameters, used in both directions, and two functions
between `config.json` and `ModelConfig`. Names and values are those of `transformers`; linear maps
are stored [out, in] there, and norms by their scale.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hybridjax.config import BlockConfig, ModelConfig, UserError, typed
from hybridjax.layers.mlp import mlp
from hybridjax.mixers import mixer

Settings = Mapping[str, Any]  # a config.json
Rows = Mapping[str, str | tuple[str, ...]]

DTYPES = {"bfloat16": "bfloat16", "float16": "bfloat16"}  # that of activations; else f32

TOP: Rows = {
    "model.embed_tokens.weight": "embedding/table",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "head",
}
NORMS: Rows = {
    "input_layernorm.weight": "norms/0/scale",
    "post_attention_layernorm.weight": "norms/1/scale",
}
ATTENTION: Rows = {
    "self_attn.q_proj.weight": "mixers/0/qkv/query/kernel",
    "self_attn.k_proj.weight": "mixers/0/qkv/key/kernel",
    "self_attn.v_proj.weight": "mixers/0/qkv/value/kernel",
    "self_attn.o_proj.weight": "mixers/0/output/kernel",
}
QK_NORMS: Rows = {
    "self_attn.q_norm.weight": "mixers/0/qkv/query_norm/scale",
    "self_attn.k_norm.weight": "mixers/0/qkv/key_norm/scale",
}
SWIGLU: Rows = {
    "mlp.gate_proj.weight": "mlp/gate/kernel",
    "mlp.up_proj.weight": "mlp/up/kernel",
    "mlp.down_proj.weight": "mlp/output/kernel",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Attributes:
    layers: by the type of a layer's mixer, the tensors of `model.layers.I.`: each is a parameter of
      the block, or several, stacked along the tensor's first axis.
    to_model: from config.json; refuses by name what the family has and we do not.
    to_settings: what config.json says of a model, besides `architectures` and `model_type`.
    logit_base: that of log-scaled attention logits, in families that know them.
    """

    architecture: str
    model_type: str
    layers: Mapping[str, Rows]
    to_model: Callable[[Settings], ModelConfig]
    to_settings: Callable[[ModelConfig, float | None], dict[str, Any]]
    logit_base: Callable[[Settings], float | None] | None = None


# ---------------------------------------------------------------- config.json -> ModelConfig


def check(settings: Settings, **supported: Any) -> None:
    """Raises `UserError` for a setting that has another value than the only supported one."""
    for name, value in supported.items():
        if settings.get(name, value) not in (value, None):
            raise UserError(
                f"config.json has {name} = {settings[name]!r}: only {value!r} is supported"
            )


def decoder(settings: Settings, layers: str, blocks: Mapping[str, Any]) -> ModelConfig:
    stored = settings.get("dtype") or settings.get("torch_dtype")
    return typed(
        dict(
            layers=layers,
            blocks=blocks,
            width=settings["hidden_size"],
            vocab=settings["vocab_size"],
            tied=settings.get("tie_word_embeddings", False),
            norm_eps=float(settings["rms_norm_eps"]),
            dtype=DTYPES.get(stored, "float32"),
        ),
        ModelConfig,
    )


def one_kind(settings: Settings, layer: Any) -> ModelConfig:
    """A decoder all of whose layers are this block."""
    return decoder(settings, "A" * settings["num_hidden_layers"], {"A": layer})


def attention(settings: Settings, **options: Any):
    """The spec of a layer's attention; `options` are added, or take precedence."""
    heads = settings["num_attention_heads"]
    usual = dict(
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        rope=True,
        theta=float(settings.get("rope_theta", 10_000.0)),
        rope_scaling=_scaling(settings.get("rope_scaling")),
        gate=False,
        eps=float(settings["rms_norm_eps"]),
    )
    return mixer("attention", **usual | options)


def _scaling(given: Settings | None) -> dict[str, Any] | None:
    """`type` is the older name of `rope_type`."""
    if given is None:
        return None
    kind = given.get("rope_type", given.get("type"))
    rest = {name: x for name, x in given.items() if name not in ("type", "rope_type")}
    return None if kind == "default" else {"rope_type": kind, **rest}


def swiglu(settings: Settings):
    check(settings, hidden_act="silu", mlp_bias=False)
    return mlp("swiglu", hidden=settings["intermediate_size"])


# ---------------------------------------------------------------- ModelConfig -> config.json


def decoder_settings(model: ModelConfig) -> dict[str, Any]:
    """What all families say."""
    return dict(
        vocab_size=model.vocab,
        hidden_size=model.width,
        num_hidden_layers=len(model.layers),
        intermediate_size=model.blocks[model.layers[0]].mlp["hidden"],
        hidden_act="silu",
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied,
    )


def one_kind_settings(model: ModelConfig, **own: Any) -> dict[str, Any]:
    """Of a decoder all of whose layers are alike; `own` is what the family adds."""
    [spec] = model.blocks[model.layers[0]].mixers
    return decoder_settings(model) | attention_settings(spec) | own


def attention_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    scaling = spec.get("rope_scaling")
    return dict(
        num_attention_heads=spec["heads"],
        num_key_value_heads=spec["kv_heads"] or spec["heads"],
        head_dim=spec["head_dim"],
        rope_theta=spec["theta"],
        **({"rope_scaling": dict(scaling)} if scaling else {}),
    )


# ---------------------------------------------------------------- the same model?


def canonical(model: ModelConfig) -> dict[str, Any]:
    """What a model computes, whatever its letters are and however its legend is written."""
    names = ("width", "vocab", "tied", "norm_eps")
    layers = [_canonical_block(model.blocks[letter]) for letter in model.layers]
    top = {name: getattr(model, name) for name in names}
    return top | {f"layer {i} {k}": v for i, layer in enumerate(layers) for k, v in layer.items()}


def _canonical_block(block: BlockConfig) -> dict[str, Any]:
    said = {name: getattr(block, name) for name in ("residual", "norms", "scale")}
    said |= {f"mlp {name}": value for name, value in (block.mlp or {}).items()}
    for i, given in enumerate(block.mixers):
        spec = mixer(**given).to_dict()  # older configs lack newer options
        if "kv_heads" in spec:
            spec["kv_heads"] = spec["kv_heads"] or spec["heads"]
        if spec.get("rope_dim") is None and "rope_dim" in spec:
            spec["rope_dim"] = spec["head_dim"]
        if spec.get("rope") is False:
            spec = {n: x for n, x in spec.items() if n != "theta" and not n.startswith("rope_")}
        said |= {f"mixer {i} {name}": value for name, value in spec.items()}
    return said


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """What sets two models apart, a line each."""
    a, b = canonical(a), canonical(b)
    names = [name for name in a | b if a.get(name) != b.get(name)]
    return [f"{name}: {a.get(name)!r} here, {b.get(name)!r} there" for name in names]
