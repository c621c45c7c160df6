"""Hugging Face directories: against logits that published code computed, there and back, and what
is wrong with them in one line."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from commands import run
from safetensors.numpy import load_file, save_file

from configs import hypenet
from hybridjax import huggingface
from hybridjax.config import MeshConfig, ModelConfig, UserError, typed
from hybridjax.huggingface import weights
from hybridjax.huggingface.hypenet import HYPENET
from hybridjax.mixers.base import Context
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters

pytest_plugins = ("commands",)
pytestmark = pytest.mark.usefixtures("shared_compilation")

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


# ---------------------------------------------------------------- what published code computed


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_published_code(name, tmp_path):
    settings, tensors, arrays = golden(name)
    pretrained = huggingface.open_directory(save(tmp_path / "theirs", settings, tensors))
    expected = arrays["logits_scaled" if name == "hypenet" else "logits"]
    base = pretrained.logit_base and jnp.float32(pretrained.logit_base)
    ctx = Context.of_rows(arrays["tokens"], logit_base=base)
    logits = jax.jit(Decoder.__call__)(pretrained.load(), arrays["tokens"], ctx)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_an_imported_model_writes_what_published_code_writes(name, tmp_path):
    settings, tensors, arrays = golden(name)
    directory = save(tmp_path / "theirs", settings, tensors)
    done = run("convert", f"--workdir={tmp_path / 'run'}", f"--import_from={directory}")
    assert done.code == 0 and "parameters" in done.out, done
    prompt, expected = (" ".join(WORDS[t] for t in arrays[n][0]) for n in ("tokens", "text"))
    done = run("generate", f"--workdir={tmp_path / 'run'}", f"--prompt={prompt}",
               f"--tokens={arrays['text'].size}")  # fmt: skip
    assert done.out.splitlines()[0] == expected, done


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["glm4", "hypenet"])
def test_export_after_import_is_the_identity(name, dtype, tmp_path):
    settings, tensors, _ = golden(name)
    stored = dict(float32=np.float32, bfloat16=ml_dtypes.bfloat16)[dtype]
    tensors = {n: x.astype(stored) for n, x in tensors.items()}
    directory = save(tmp_path / "theirs", settings, tensors)
    workdir, back = f"--workdir={tmp_path / 'run'}", tmp_path / "back"
    assert run("convert", workdir, f"--import_from={directory}").code == 0
    done = run("convert", workdir, f"--export_to={back}", f"--dtype={dtype}", "--shard_gb=2e-5")
    assert done.code == 0, done

    again = tensors_in(back)
    assert again.keys() == tensors.keys()
    for n, x in again.items():
        assert (x.dtype, x.shape, x.tobytes()) == (stored, tensors[n].shape, tensors[n].tobytes())
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 1 and all(f.stat().st_size < 20_000 + 4_000 for f in files)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    given, written = (json.loads((d / "config.json").read_text()) for d in (directory, back))
    apart = {k: (given.get(k), v) for k, v in written.items() if given.get(k) != v}
    assert apart.keys() <= {"torch_dtype", "attention_bias", "lightning_use_short_conv"}, apart
    assert (back / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert huggingface.open_directory(back).logit_base == (20.0 if name == "hypenet" else None)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_loaded_onto_a_mesh(scan, tmp_path):
    settings, tensors, _ = golden("hypenet")
    pretrained = huggingface.open_directory(save(tmp_path / "theirs", settings, tensors))
    config = dataclasses.replace(pretrained.model, scan=scan)
    whole = pretrained.load(config)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        cut = pretrained.load(config)
        placed = jax.jit(lambda: place_parameters(Decoder(config, jax.random.key(0))))()
    for x, y, z in zip(*map(jax.tree.leaves, (whole, cut, placed)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert y.sharding == z.sharding
        assert y.dtype == jnp.float32
    parts = [len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(cut)]
    assert parts.count(8) > 10


MEMORY = """
import os, sys, threading, time
import jax, jax.numpy as jnp
from hybridjax import huggingface
from hybridjax.huggingface import weights

def private():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

pretrained = huggingface.open_directory(sys.argv[1])
x = jnp.ones((8, 8))
weights._settled(x), weights._put(x, x[0], 0)
before, highest, ended = private(), 0, threading.Event()

def watch():
    global highest
    while not ended.wait(0.001):
        highest = max(highest, private())

watcher = threading.Thread(target=watch)
watcher.start()
model = jax.block_until_ready(pretrained.load())
ended.set()
watcher.join()
final = sum(x.nbytes for x in jax.tree.leaves(model))
print(highest - before, final)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_memory_is_that_of_the_model_and_of_one_tensor(dtype, tmp_path):
    """Read whole, the f32 model would need twice its size."""
    settings, _, _ = golden("qwen3")
    settings |= dict(vocab_size=24_000, hidden_size=512, intermediate_size=4096)
    settings |= dict(num_hidden_layers=8, tie_word_embeddings=True)
    pretrained = huggingface.open_directory(save(tmp_path / "none", settings, {}))
    shapes = weights.shapes(pretrained.model, pretrained.family)
    save(tmp_path / "large", settings, {n: np.ones(shape, dtype) for n, shape in shapes.items()})
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "large"], check=True, capture_output=True,
        text=True, cwd=PARITY.parent.parent,
    )  # fmt: skip
    highest, final = map(int, done.stdout.split())
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    assert final > 3 * largest and highest > final
    assert highest < final + 1.5 * largest, (highest, final, largest)


# ---------------------------------------------------------------- HypeNet as released

RELEASED = {  # hidden, FFN, query heads, attention layers (thunlp/hybrid-linear-attention, configs)
    "2b": (2048, 6144, 16, 28, {2, 3, 6, 8, 9, 21, 25}),
    "5b": (2560, 9728, 32, 36, {0, 1, 7, 14, 15, 22, 24, 31, 33}),
    "9b": (4096, 12288, 32, 36, {1, 2, 4, 6, 7, 10, 24, 33, 34}),
}


@pytest.mark.parametrize("preset", RELEASED)
def test_names_and_shapes_of_hypenet(preset):
    D, F, H, L, attention = RELEASED[preset]
    K, expected = 128, {"model.embed_tokens.weight": (151936, D), "model.norm.weight": (D,)}
    for i in range(L):
        G = 8 if i in attention else H
        gate = {"o_gate": (H * K, D)} if i in attention else {"z_proj": (H * K, D)}
        norms = {"q_norm": (K,), "k_norm": (K,)} | ({} if i in attention else {"o_norm": (H * K,)})
        linear = {"q_proj": (H * K, D), "k_proj": (G * K, D), "v_proj": (G * K, D)}
        mixer = linear | {"o_proj": (D, H * K)} | gate | norms
        rest = {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        rest |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        named = {f"self_attn.{name}": shape for name, shape in mixer.items()} | rest
        expected |= {f"model.layers.{i}.{n}.weight": shape for n, shape in named.items()}

    model = typed(hypenet.get_config(preset)).model
    assert weights.shapes(model, HYPENET) == expected
    assert huggingface.family_of(model) is HYPENET
    said = HYPENET.to_settings(model, 500.0)
    assert said["attn_logits_scaling"] == "hype 500"
    assert (said["rope_theta"], said["attn_use_rope"], said["lightning_use_rope"]) == (1e6, 0, 1)
    assert (said["lightning_nkv"], said["num_key_value_heads"]) == (H, 8)
    assert said["tie_word_embeddings"] is True
    assert {i for i, kind in enumerate(said["mixer_types"]) if kind == "attn"} == attention


# ---------------------------------------------------------------- what is wrong, in one line


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
    "a cut file": (cut, "00002-of-00003.safetensors is torn .* ends at byte"),
    "no safetensors": (lambda d: shards(d)[0].write_bytes(b"cat" * 99), "is torn or not safet"),
    "a size that is not the shape's": (
        lambda d: rewrite(of_norm(d), wider),
        r"model.norm.weight is F32 \[25\] in 96 bytes",
    ),
    "an offset beyond the end": (lambda d: rewrite(of_norm(d), beyond), "ends at byte 1001"),
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
    "rope scaling": ("llama", dict(rope_scaling=dict(type="yarn", factor=4.0)), "of type 'yarn'"),
    "biases": ("llama", dict(attention_bias=True), "has attention_bias = True: only False"),
    "windows": ("qwen3", dict(use_sliding_window=True), "use_sliding_window = True"),
    "activation": ("glm4", dict(hidden_act="gelu"), "hidden_act = 'gelu': only 'silu'"),
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
        "model.layers.1.self_attn.k_norm.weight is missing; model.layers.2.mlp.up_proj.weight has no place"
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
    "another eps": (dict(norm_eps=1e-5), "Qwen3ForCausalLM is the nearest.* eps: 1e-06 and 1e-05"),
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


def assert_says(done, line):
    assert re.search(line, done.error), done.error
