"""HypeNet (arXiv 2601.22156), as its authors' code (thunlp/hybrid-linear-attention) saves it.

The gate of an attention layer is called `o_gate`, that of a Lightning layer `z_proj`; only the
latter has an output norm. `mixer_types` is the stack.
"""

from typing import Any

from hybridjax.config import ModelConfig, UserError
from hybridjax.huggingface.family import (
    ATTENTION,
    NORMS,
    QK_NORMS,
    SWIGLU,
    Family,
    Rows,
    Settings,
    attention,
    attention_settings,
    check,
    decoder,
    decoder_settings,
    swiglu,
)
from hybridjax.mixers import mixer
from hybridjax.models import block

GATE = "mixers/0/output/gate/kernel"
LAYER: Rows = NORMS | ATTENTION | QK_NORMS | SWIGLU
LETTERS = {"attn": "A", "lightning-attn": "L"}


def to_model(settings: Settings) -> ModelConfig:
    check(
        settings,
        attention_bias=False,
        rope_scaling=None,
        lightning_rope_scaling=False,
        lightning_scale="1/sqrt(d)",
        lightning_use_short_conv=False,
    )
    types = settings.get("mixer_types") or ["attn"] * settings["num_hidden_layers"]
    if unknown := sorted(set(types) - set(LETTERS)):
        raise UserError(f"config.json has layers of type {unknown}: there are {list(LETTERS)}")
    softmax = attention(
        settings,
        rope=settings.get("attn_use_rope", True),
        gate=settings.get("attn_use_output_gate", False),
    )
    given = lambda name, default: settings.get(f"lightning_{name}") or default
    linear = mixer(
        "lightning",
        heads=given("nh", softmax.heads),
        kv_heads=given("nkv", softmax.kv_heads),
        head_dim=given("head_dim", softmax.head_dim),
        rope=settings.get("lightning_use_rope", True),
        theta=softmax.theta,
        qk_norm=given("use_qk_norm", False),
        gate=given("use_output_gate", False),
        output_norm=given("use_output_norm", False),
        eps=softmax.eps,
    )
    ffn = swiglu(settings)
    blocks = {"A": block(softmax, mlp=ffn), "L": block(linear, mlp=ffn)}
    layers = "".join(LETTERS[kind] for kind in types)
    return decoder(settings, layers, {letter: blocks[letter] for letter in sorted(set(layers))})


def to_settings(model: ModelConfig, logit_base: float | None) -> dict[str, Any]:
    kinds = {"attention": "attn", "lightning": "lightning-attn"}
    of_layers = [model.blocks[letter].mixers[0] for letter in model.layers]
    types = [kinds[spec["type"]] for spec in of_layers]
    specs = dict(zip(types, of_layers, strict=True))
    softmax, linear = specs.get("attn"), specs.get("lightning-attn")
    said = decoder_settings(model) | attention_settings(softmax or linear)
    said |= dict(
        mixer_types=types,
        attention_bias=False,
        attn_logits_scaling=None if logit_base is None else f"hype {logit_base:g}",
    )
    if softmax:
        said |= dict(attn_use_rope=softmax["rope"], attn_use_output_gate=softmax["gate"])
    if linear:
        said |= dict(
            rope_theta=linear["theta"] if linear["rope"] else said["rope_theta"],
            lightning_nh=linear["heads"],
            lightning_nkv=linear["kv_heads"] or linear["heads"],
            lightning_head_dim=linear["head_dim"],
            lightning_use_rope=linear["rope"],
            lightning_rope_scaling=None,
            lightning_scale="1/sqrt(d)",
            lightning_use_qk_norm=linear["qk_norm"],
            lightning_use_output_norm=linear["output_norm"],
            lightning_use_output_gate=linear["gate"],
            lightning_use_short_conv=False,
        )
    return said


def logit_base(settings: Settings) -> float | None:
    """`a` of `attn_logits_scaling = "hype a"`, for which the authors' code takes 362 if absent."""
    scaling = settings.get("attn_logits_scaling")
    if scaling is None:
        return None
    words = str(scaling).split()
    try:
        if words[0] != "hype":
            raise ValueError(words[0])
        return float(words[1]) if len(words) > 1 else 362.0
    except (ValueError, IndexError) as error:
        raise UserError(
            f"config.json has attn_logits_scaling = {scaling!r}: only 'hype A' is supported"
        ) from error


HYPENET = Family(
    architecture="HypeNetForCausalLM",
    model_type="hypenet",
    layers={
        "attention": LAYER | {"self_attn.o_gate.weight": GATE},
        "lightning": LAYER
        | {
            "self_attn.z_proj.weight": GATE,
            "self_attn.o_norm.weight": "mixers/0/output_norm/scale",
        },
    },
    to_model=to_model,
    to_settings=to_settings,
    logit_base=logit_base,
)
