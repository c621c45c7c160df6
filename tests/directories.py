"""Tiny Hugging Face directories, made of the golden files of published code."""

import json
import pathlib
import re

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

PARITY = pathlib.Path(__file__).parent / "parity"
SETTINGS = {  # of the golden files that do not hold their own; see parity/make_golden.py
    "qwen3": dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    ),
    "hypenet": dict(
        architectures=["HypeNetForCausalLM"],
        model_type="hypenet",
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        mixer_types=["lightning-attn", "attn", "lightning-attn", "lightning-attn"],
        attn_logits_scaling="hype 20",
        attn_use_rope=False,
        attn_use_output_gate=True,
        lightning_nh=6,
        lightning_nkv=6,
        lightning_head_dim=8,
        lightning_use_rope=True,
        lightning_rope_scaling=None,
        lightning_scale="1/sqrt(d)",
        lightning_use_qk_norm=True,
        lightning_use_output_norm=True,
        lightning_use_output_gate=True,
    ),
}
USUAL = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=128,
    torch_dtype="float32",
)
WORDS = [f"t{i}" for i in range(47)] + ["<|endoftext|>"]
FAMILIES = ["qwen3", "llama", "glm4", "hypenet"]


def golden(name):
    """(settings, tensors, the rest) of a golden file."""
    with np.load(PARITY / f"{name}.npz") as file:
        arrays = dict(file)
    tensors = {n: arrays.pop(n).astype(np.float32) for n in list(arrays) if n.endswith(".weight")
               or n.endswith(".bias")}  # fmt: skip
    stored = arrays.pop("settings", None)
    settings = json.loads(str(stored)) if stored is not None else USUAL | SETTINGS[name]
    return settings, tensors, arrays


def save(directory, settings, tensors, shards=3):
    """A directory with these tensors in shards, and a tokenizer of one word for each token."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def tensors_in(directory):
    found = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
    return {name: x for tensors in found for name, x in tensors.items()}


def assert_says(done, line):
    assert re.search(line, done.error), done.error
