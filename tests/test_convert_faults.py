"""What is wrong with a Hugging Face directory, or with a model that is to be one: one line."""

import json

import numpy as np
import pytest
from commands import run
from directories import assert_says, golden, save

from hybridjax import huggingface
from hybridjax.config import ModelConfig, UserError, typed
from hybridjax.huggingface import weights
from hybridjax.huggingface.hypenet import HYPENET
from hybridjax.models import block, mixer, mlp

pytest_plugins = ("commands",)


def rewrite(file, change):
    """The header of a safetensors file, changed."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def wider(header):
    header["model.norm.weight"]["shape"] = [25]


def beyond(header):
    header["model.norm.weight"]["data_offsets"] = [10**6, 10**6 + 96]


def only_pickles(directory):
    [file.unlink() for file in directory.glob("model*")]
    (directory / "pytorch_model.bin").write_bytes(b"cposix")


def lead_outside(directory):
    index = {"weight_map": {"model.norm.weight": "../theirs/config.json"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def of_norm(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"]["model.norm.weight"]


def cut(directory):
    file = shards(directory)[1]
    file.write_bytes(file.read_bytes()[:-5])


ON_DISK = {  # name -> (what happens to the directory, the line)
    "no config.json": (lambda d: (d / "config.json").unlink(), "theirs is no Hugging Face dir"),
    "broken config.json": (lambda d: (d / "config.json").write_text("{"), "cannot read .*config.j"),
    "no tensors": (lambda d: [f.unlink() for f in d.glob("model*")], "holds no model.safetensors"),
    "pickles": (only_pickles, "pytorch_model.bin, a pickle, .* never read"),
    "a missing shard": (
        lambda d: shards(d)[1].unlink(),
        "lacks model-00002-of-00003.safetensors, of 3 shards",
    ),
    "an index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
    "an index that leads outside": (lead_outside, "lacks ../theirs/config.json, of 1 shards"),
    "a cut file": (cut, "00002-of-00003.safetensors is torn .* ends at byte"),
    "no safetensors": (lambda d: shards(d)[0].write_bytes(b"cat" * 99), "is torn or not safet"),
    "a size that is not the shape's": (
        lambda d: rewrite(of_norm(d), wider),
        r"model.norm.weight is F32 \[25\] in 96 bytes",
    ),
    "an offset beyond the end": (lambda d: rewrite(of_norm(d), beyond), r"byte 100\d{4} of"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json: give --token"),
}


@pytest.mark.parametrize("damage, line", ON_DISK.values(), ids=ON_DISK)
def test_a_damaged_directory_is_one_line(damage, line, tmp_path):
    settings, tensors, _ = golden("qwen3")
    damage(directory := save(tmp_path / "theirs", settings, tensors))
    done = run("convert", f"--workdir={tmp_path / 'run'}", f"--import_from={directory}")
    assert_says(done, line)
    assert not (tmp_path / "run" / "config.json").exists()


IN_SETTINGS = {  # name -> (of which family, changes of config.json, the line)
    "architecture": (
        "qwen3",
        dict(architectures=["MambaForCausalLM"]),
        "holds a MambaForCausalLM: supported are Qwen3ForCausalLM, LlamaForCausalLM, Glm4ForCa",
    ),
    "a missing setting": ("qwen3", dict(hidden_size=...), "lacks 'hidden_size'"),
    "rope scaling": ("llama", dict(rope_scaling=dict(type="dynamic", factor=4.0)), "of type 'dyn"),
    "biases": ("llama", dict(attention_bias=True), "has attention_bias = True: only False"),
    "windows": ("qwen3", dict(use_sliding_window=True), "use_sliding_window = True"),
    "activation": ("glm4", dict(hidden_act="gelu"), "hidden_act = 'gelu': only 'silu'"),
    "rotation": ("glm4", dict(partial_rotary_factor=2.0), "rope_dim is 32: it must be at most"),
    "kinds of layers": ("hypenet", dict(mixer_types=["attn", "gdn"] * 2), "type .'gdn'.: there"),
    "constant scaling": ("hypenet", dict(attn_logits_scaling=1.5), "only 'hype A' is supported"),
    "small vocabulary": ("qwen3", dict(vocab_size=40), "has 48 tokens, the model 40: give its"),
}


@pytest.mark.parametrize("name, changes, line", IN_SETTINGS.values(), ids=IN_SETTINGS)
def test_a_model_that_we_do_not_have_is_one_line(name, changes, line, tmp_path):
    settings, tensors, _ = golden(name)
    settings = {k: v for k, v in (settings | changes).items() if v is not ...}
    directory = save(tmp_path / "theirs", settings, tensors)
    assert_says(run("convert", f"--workdir={tmp_path / 'run'}", f"--import_from={directory}"), line)


def test_every_tensor_that_does_not_fit_is_named():
    settings, tensors, _ = golden("qwen3")
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["lm_head.weight"]
    tensors["model.rotary_emb.inv_freq"] = np.ones(8)  # derived: ignored
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:40]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    config = huggingface.FAMILIES["Qwen3ForCausalLM"].to_model(settings)
    with pytest.raises(UserError) as raised:
        weights.load(config, huggingface.FAMILIES["Qwen3ForCausalLM"], tensors)
    assert str(raised.value) == (
        "4 tensors do not fit the configuration: lm_head.weight is [40, 24], not [48, 24]; "
        "model.norm.weight is int32, not one of F32, F16, BF16; "
        "model.layers.1.self_attn.k_norm.weight is missing; "
        "model.layers.2.mlp.up_proj.weight has no place"
    )


@pytest.mark.parametrize("equal", [True, False], ids=["the same", "another"])
def test_a_head_in_a_tied_model_must_be_the_embedding(equal):
    settings, tensors, _ = golden("hypenet")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (not equal)
    config = HYPENET.to_model(settings)
    if equal:
        assert weights.load(config, HYPENET, tensors).head is None
    else:
        with pytest.raises(UserError, match="tie_word_embeddings is true, but lm_head.weight is"):
            weights.load(config, HYPENET, tensors)


USAGE = {
    "neither": ([], "give --workdir=DIR, and --import_from"),
    "both": (["--import_from=a", "--export_to=b"], "give --workdir=DIR, and --import_from"),
    "no run to export": (["--export_to=b"], "no hybridjax run in"),
    "no such directory": (["--import_from=/none"], "/none is no Hugging Face directory"),
}


@pytest.mark.parametrize("given, line", USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line(given, line, tmp_path):
    assert_says(run("convert", f"--workdir={tmp_path / 'run'}", *given), line)


STACKS = {
    "another eps": (dict(norm_eps=1e-5), "Qwen3ForCausalLM is the nearest.* eps: 1e-06 here"),
    "another mixer": (
        dict(
            layers="G",
            blocks=dict(
                G=block(mixer("gated_deltanet", heads=2, head_dim=8), mlp=mlp("swiglu", hidden=8))
            ),
        ),
        "no Hugging Face family has all the kinds of layers of 'G'",
    ),
}


@pytest.mark.parametrize("changes, line", STACKS.values(), ids=STACKS)
def test_a_stack_that_no_family_has(changes, line):
    layer = block(
        mixer("attention", heads=2, head_dim=8, rope=True, gate=False), mlp=mlp("swiglu", hidden=8)
    )
    usual = dict(layers="A", blocks=dict(A=layer), width=8, vocab=16)
    assert huggingface.family_of(typed(usual, ModelConfig)).model_type == "qwen3"
    with pytest.raises(UserError, match=line):
        huggingface.family_of(typed(usual | changes, ModelConfig))
