"""Hugging Face directories: against logits that published code computed, and there and back."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import micro
import ml_dtypes
import numpy as np
import pytest
from commands import run, train
from directories import PARITY, WORDS, assert_says, golden, save, tensors_in

from configs import hypenet, pretrained
from hybridjax import huggingface
from hybridjax.config import MeshConfig, UserError, typed
from hybridjax.huggingface import weights
from hybridjax.huggingface.hypenet import HYPENET
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters

pytest_plugins = ("commands",)
pytestmark = pytest.mark.usefixtures("shared_compilation")


# ---------------------------------------------------------------- what published code computed


@pytest.mark.parametrize("name", ["qwen3", "llama", "glm4", "hypenet"])
def test_logits_are_those_of_published_code(name, tmp_path):
    settings, tensors, arrays = golden(name)
    read = huggingface.open_directory(save(tmp_path / "theirs", settings, tensors))
    expected = arrays["logits_scaled" if name == "hypenet" else "logits"]
    base = read.logit_base and jnp.float32(read.logit_base)
    ctx = Context.of_rows(arrays["tokens"], logit_base=base)
    logits = jax.jit(Decoder.__call__)(read.load(), arrays["tokens"], ctx)
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
    assert apart.keys() <= {"torch_dtype"}, apart
    assert (back / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert huggingface.open_directory(back).logit_base == (20.0 if name == "hypenet" else None)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_loaded_onto_a_mesh(scan, tmp_path):
    settings, tensors, _ = golden("hypenet")
    read = huggingface.open_directory(save(tmp_path / "theirs", settings, tensors))
    config = dataclasses.replace(read.model, scan=scan)
    whole = read.load(config)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        cut = read.load(config)
        back = dict(weights.tensors_of(config, read.family, cut))
        placed = jax.jit(lambda: place_parameters(Decoder(config, jax.random.key(0))))()
    for x, y, z in zip(*map(jax.tree.leaves, (whole, cut, placed)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert y.sharding == z.sharding
        assert y.dtype == jnp.float32
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[n], x) for n, x in tensors.items())
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
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(np.float32, id="f32"),
        pytest.param(ml_dtypes.bfloat16, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_the_model_and_of_one_tensor(dtype, tmp_path):
    """Read whole, the f32 model would need twice its size."""
    settings, _, _ = golden("qwen3")
    settings |= dict(vocab_size=24_000, hidden_size=512, intermediate_size=4096)
    settings |= dict(num_hidden_layers=8, tie_word_embeddings=True)
    read = huggingface.open_directory(save(tmp_path / "none", settings, {}))
    shapes = weights.shapes(read.model, read.family)
    save(tmp_path / "large", settings, {n: np.ones(shape, dtype) for n, shape in shapes.items()})
    freed_at_once = dict(MALLOC_MMAP_THRESHOLD_="65536")  # what glibc keeps for later is not ours
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "large"], check=True, capture_output=True,
        text=True, cwd=PARITY.parent.parent, env=os.environ | freed_at_once,
    )  # fmt: skip
    highest, final = map(int, done.stdout.split())
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    assert final > 3 * largest and highest > final
    assert highest < final + 1.5 * largest, (highest, final, largest)


# ---------------------------------------------------------------- training starts from them


def tiny_directory(path):
    """A model for bytes, and the config with which it could be trained from scratch."""
    config = typed(micro.get_config("micro"))
    model = jax.jit(lambda: Decoder(config.model, jax.random.key(7)))()
    huggingface.save_directory(path, config.model, model)
    return path


@pytest.mark.slow
def test_training_starts_from_a_directory_or_an_import_of_it(tmp_path):
    directory = tiny_directory(tmp_path / "theirs")
    imported = f"--workdir={tmp_path / 'imported'}"
    bytes_ = "--tokenizer=bytes"
    assert run("convert", imported, f"--import_from={directory}", bytes_).code == 0
    standing = ("--config.steps=1", "--config.optimizer.learning_rate=0.0")
    for name in ("theirs", "imported"):
        workdir, back = tmp_path / f"from_{name}", tmp_path / f"{name}_back"
        done = train(workdir, f"--config.init_from={tmp_path / name}", *standing)
        assert done.code == 0, done
        assert run("convert", f"--workdir={workdir}", f"--export_to={back}").code == 0
        expected, actual = tensors_in(directory), tensors_in(back)
        assert expected.keys() == actual.keys()
        for n, x in expected.items():
            np.testing.assert_array_equal(x, actual[n], err_msg=n)
    other = train(tmp_path / "x", f"--config.init_from={directory}", "--config.model.width=24")
    assert_says(other, "another model than the .*width: 24 here, 16 there.: take config.model")
    again = run("convert", imported, f"--import_from={directory}", bytes_)
    assert_says(again, "has checkpoints already: choose another --workdir")


def test_the_config_of_a_directory(tmp_path):
    settings, tensors, _ = golden("llama")
    directory = save(tmp_path / "theirs", settings, tensors)
    change = "model.blocks.A.mixers[0].window=7"
    config = pretrained.get_config(f"{directory},steps=3,{change}")
    assert (config.name, config.steps, config.init_from) == ("tuned-theirs", 3, str(directory))
    model, plain = typed(config).model, huggingface.open_directory(directory).model
    assert huggingface.differences(model, plain) == [
        f"layer {i} mixer 0 window: 7 here, None there" for i in range(2)
    ]
    with pytest.raises(UserError, match="no directory: give --config=configs/pretrained.py:DIR"):
        pretrained.get_config()


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
