"""Tiny models of `transformers`, with random weights, saved as Hugging Face directories."""

import numpy as np

SHAPE = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
MODELS = {  # name -> (class in transformers, what its config adds to SHAPE)
    "qwen3": ("Qwen3", dict(num_hidden_layers=3, rope_theta=1e6, tie_word_embeddings=True)),
    "qwen3-untied": ("Qwen3", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    "qwen3-yarn": ("Qwen3", dict(rope_scaling=YARN)),
    "llama": ("Llama", dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    "llama-plain": ("Llama", dict(num_key_value_heads=4, head_dim=6, tie_word_embeddings=True)),
    "llama-interpolated": ("Llama", dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
    "glm4": ("Glm4", dict(attention_bias=True)),
    "glm4-plain": ("Glm4", dict(attention_bias=False, partial_rotary_factor=1.0)),
}
GOLDEN = ("llama", "glm4")


def published(name: str, rng: np.random.Generator):
    """The model, in f32, with weights that are exact in bf16 and f16 and nowhere the default."""
    import torch
    import transformers

    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    for parameter in model.parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(size=shape) / np.sqrt(shape[1])
        with torch.no_grad():
            parameter.copy_(torch.tensor(value).bfloat16())
    return model
