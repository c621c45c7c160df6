"""Llama 2 and 3 (arXiv 2407.21783), and others that are saved as such."""

from typing import Any

from hybridjax.config import ModelConfig
from hybridjax.huggingface.family import (
    ATTENTION,
    NORMS,
    SWIGLU,
    Family,
    Settings,
    attention,
    attention_settings,
    check,
    decoder,
    decoder_settings,
    swiglu,
)
from hybridjax.models import block


def to_model(settings: Settings) -> ModelConfig:
    check(settings, attention_bias=False)
    layer = block(attention(settings, qk_norm=False), mlp=swiglu(settings))
    return decoder(settings, "A" * settings["num_hidden_layers"], {"A": layer})


def to_settings(model: ModelConfig, logit_base: float | None) -> dict[str, Any]:
    [spec] = model.blocks[model.layers[0]].mixers
    rest = dict(attention_bias=False, mlp_bias=False)
    return decoder_settings(model) | attention_settings(spec) | rest


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    layers={"attention": NORMS | ATTENTION | SWIGLU},
    to_model=to_model,
    to_settings=to_settings,
)
