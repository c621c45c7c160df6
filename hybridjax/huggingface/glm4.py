"""GLM-4-0414 (`glm4` in transformers): sandwich norms, biases, half of each head rotated in pairs.

Its names of norms mislead: `post_attention_layernorm` is the norm before the MLP, as in Llama, and
`post_self_attn_layernorm` the one on the output of attention.
"""

from typing import Any

from hybridjax.config import ModelConfig
from hybridjax.huggingface.family import (
    ATTENTION,
    NORMS,
    Family,
    Rows,
    Settings,
    attention,
    one_kind,
    one_kind_settings,
    swiglu,
)
from hybridjax.models import block

ROWS: Rows = {
    "self_attn.q_proj.bias": "mixers/0/qkv/query/bias",
    "self_attn.k_proj.bias": "mixers/0/qkv/key/bias",
    "self_attn.v_proj.bias": "mixers/0/qkv/value/bias",
    "post_self_attn_layernorm.weight": "output_norms/0/scale",
    "post_mlp_layernorm.weight": "output_norms/1/scale",
    "mlp.gate_up_proj.weight": ("mlp/gate/kernel", "mlp/up/kernel"),
    "mlp.down_proj.weight": "mlp/output/kernel",
}


def to_model(settings: Settings) -> ModelConfig:
    usual = attention(settings)
    own = dict(
        rope_dim=int(usual.head_dim * settings.get("partial_rotary_factor", 0.5)),
        rope_interleaved=True,
        qkv_bias=settings.get("attention_bias", True),
        qk_norm=False,
    )
    layer = block(attention(settings, **own), mlp=swiglu(settings), norms="sandwich")
    return one_kind(settings, layer)


def to_settings(model: ModelConfig, logit_base: float | None) -> dict[str, Any]:
    [spec] = model.blocks[model.layers[0]].mixers
    return one_kind_settings(
        model,
        partial_rotary_factor=(spec.get("rope_dim") or spec["head_dim"]) / spec["head_dim"],
        attention_bias=spec.get("qkv_bias", False),
    )


GLM4 = Family(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    layers={"attention": NORMS | ATTENTION | ROWS},
    to_model=to_model,
    to_settings=to_settings,
)
