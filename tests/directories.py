"""Tiny Hugging Face directories, made of the golden files of published code."""

import json
import pathlib
import re

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

PARITY = pathlib.Path(__file__).parent / "parity"
WORDS = [f"t{i}" for i in range(47)] + ["<|endoftext|>"]


def golden(name):
    """config.json, tensors, and the rest of a golden file."""
    with np.load(PARITY / f"{name}.npz") as file:
        arrays = dict(file)
    names = [name for name in arrays if name.endswith((".weight", ".bias"))]
    tensors = {name: arrays.pop(name).astype(np.float32) for name in names}
    return json.loads(str(arrays.pop("settings"))), tensors, arrays


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
