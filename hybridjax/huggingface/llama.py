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
    check,
    one_kind,
    one_kind_settings,
    swiglu,
)
from hybridjax.models import block


def to_model(settings: Settings) -> ModelConfig:
    check(settings, attention_bias=False)
    return one_kind(settings, block(attention(settings, qk_norm=False), mlp=swiglu(settings)))


def to_settings(model: ModelConfig, logit_base: float | None) -> dict[str, Any]:
    return one_kind_settings(model, attention_bias=False, mlp_bias=False)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    layers={"attention": NORMS | ATTENTION | SWIGLU},
    to_model=to_model,
    to_settings=to_settings,
)
