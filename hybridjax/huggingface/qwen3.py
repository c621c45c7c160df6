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
    check,
    one_kind,
    one_kind_settings,
    swiglu,
)
from hybridjax.models import block


def to_model(settings: Settings) -> ModelConfig:
    check(settings, attention_bias=False, use_sliding_window=False)
    return one_kind(settings, block(attention(settings), mlp=swiglu(settings)))


def to_settings(model: ModelConfig, logit_base: float | None) -> dict[str, Any]:
    return one_kind_settings(model, attention_bias=False)


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    layers={"attention": NORMS | ATTENTION | QK_NORMS | SWIGLU},
    to_model=to_model,
    to_settings=to_settings,
)
