"""Qwen3, the dense ones (arXiv 2505.09388): queries and keys are normalised per head."""

from typing import Any

from hybridjax.config import ModelConfig
from hybridjax.huggingface.family import (
    ATTENTION,
    NORMS,
    QK_NORMS,
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
    check(settings, attention_bias=False, use_sliding_window=False)
    layer = block(attention(settings), mlp=swiglu(settings))
    return decoder(settings, "A" * settings["num_hidden_layers"], {"A": layer})


def to_settings(model: ModelConfig, logit_base: float | None) -> dict[str, Any]:
    [spec] = model.blocks[model.layers[0]].mixers
    return decoder_settings(model) | attention_settings(spec) | dict(attention_bias=False)


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    layers={"attention": NORMS | ATTENTION | QK_NORMS | SWIGLU},
    to_model=to_model,
    to_settings=to_settings,
)
