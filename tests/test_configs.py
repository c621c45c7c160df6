"""Every shipped config: its small presets take a step, its large ones have the published shapes."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from hybridjax.config import Config, UserError, typed
from hybridjax.data.pipeline import make_loader
from hybridjax.data.tokenizer import load_tokenizer
from hybridjax.evaluate import task_of
from hybridjax.models.decoder import Decoder
from hybridjax.optimizer import make_optimizer
from hybridjax.train import TrainState, make_train_step

FILES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
TINY = [  # by default one of each file
    pytest.param(
        file, preset, id=f"{file.stem}:{preset}",
        marks=() if preset == "tiny" else pytest.mark.slow,
    )
    for file in FILES
    if file.stem != "halo"  # of another command: tests/halo
    for preset in runpy.run_path(str(file)).get("PRESETS", ())
    if preset.startswith("tiny")
]  # fmt: skip


def load(file: pathlib.Path | str, arg: str = "") -> Config:
    if isinstance(file, str):
        file = FILES[[f.stem for f in FILES].index(file)]
    return typed(runpy.run_path(str(file))["get_config"](arg))


def parameters(config: Config) -> int:
    model = jax.eval_shape(lambda: Decoder(config.model, jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(model))


@pytest.mark.parametrize(("file", "preset"), TINY)
def test_a_tiny_preset_takes_a_step(file, preset):
    config = load(file, f"{preset},batch_size=2")
    model = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    before = jax.tree.map(jnp.copy, model)
    optimizer = make_optimizer(config.optimizer, config.steps, model)
    loader = make_loader(config.data, seq_len=config.seq_len, batch_size=2, seed=0)
    state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
    state, scalars = make_train_step(optimizer, config)(state, next(loader))
    assert jnp.isfinite(scalars["loss"])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.model, before)
    assert all(jax.tree.leaves(moved))


def test_the_transformer_twins_have_the_size_of_tiny():
    tiny = parameters(load("hypenet"))
    for preset in ("tiny-transformer", "tiny-nope", "tiny-reverse"):
        assert abs(parameters(load("hypenet", preset)) / tiny - 1) < 0.05


RELEASED = {  # layers, width, FFN, heads, attention layers of the released configs
    "2b": (28, 2048, 6144, 16, [2, 3, 6, 8, 9, 21, 25]),
    "5b": (36, 2560, 9728, 32, [0, 1, 7, 14, 15, 22, 24, 31, 33]),
    "9b": (36, 4096, 12288, 32, [1, 2, 4, 6, 7, 10, 24, 33, 34]),
}


@pytest.mark.parametrize("preset", RELEASED)
def test_released_shapes(preset):
    depth, width, hidden, heads, attention = RELEASED[preset]
    model = load("hypenet", preset).model
    assert [i for i, letter in enumerate(model.layers) if letter == "A"] == attention
    assert (len(model.layers), model.width, model.vocab, model.tied) == (depth, width, 151936, True)
    softmax, linear = model.blocks["A"].mixers[0], model.blocks["L"].mixers[0]
    assert (softmax["heads"], softmax["kv_heads"], softmax["head_dim"]) == (heads, 8, 128)
    assert (linear["heads"], linear["kv_heads"], linear["head_dim"]) == (heads, None, 128)
    assert (softmax["rope"], linear["rope"], linear["theta"]) == (False, True, 1e6)
    assert model.blocks["A"].mlp["hidden"] == model.blocks["L"].mlp["hidden"] == hidden


def test_from_scratch_500m_is_the_papers():
    config = load("hypenet", "500m")
    assert config.model.layers == "ALLL" * 7
    assert (config.batch_size, config.seq_len, config.steps) == (128, 4096, 40_000)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate) == (5e-4, 5e-5)
    assert (optimizer.schedule, optimizer.weight_decay) == ("wsd", 0.1)
    assert 0.5e9 < parameters(config) < 0.7e9


def test_qwen3_next_shape_has_the_published_layers():
    model = load("gdn", "qwen3-next-shape").model
    assert (model.layers, model.width, model.vocab) == ("GGGA" * 12, 2048, 151936)
    linear, full = (dict(model.blocks[letter].mixers[0]) for letter in "GA")
    names = ("heads", "value_heads", "head_dim", "value_dim", "convolution")
    assert [linear[name] for name in names] == [16, 32, 128, None, 4]
    assert [full[name] for name in ("heads", "kv_heads", "head_dim")] == [16, 2, 256]


VARIANTS = runpy.run_path(str(FILES[0].parent / "hsa.py"))["VARIANTS"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_hsa_is_another_model_that_can_be_built(variant):
    plain, config = load("hsa"), load("hsa", f"tiny,{variant}")
    assert (config.model, config.data) != (plain.model, plain.data)
    assert config.name == f"hsa-tiny-{variant}"
    assert parameters(config) <= parameters(plain) + 1


BASELINES = (
    "rope", "nope", "yarn", "landmark", "nsa", "moba", "stick_breaking", "mamba2",
)  # fmt: skip


@pytest.mark.parametrize(
    "preset", ["tiny", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mini", "345m"))]
)
def test_baselines_of_hsa_have_its_size(preset):
    plain = load("hsa", preset)
    layers = sum(letter != "E" for letter in plain.model.layers)
    for baseline in BASELINES:
        config = load("hsa", f"{preset},{baseline}")
        assert config.model.layers == "A" * layers
        assert abs(parameters(config) / parameters(plain) - 1) < 0.02, baseline


def test_variants_of_hsa_add_up():
    config = load("hsa", "mini,no_encoder,no_bypass,dense_topk,once_per_chunk")
    encoder, blocks = config.model.blocks["E"].mixers[0], config.model.blocks
    assert (encoder["encoder_layers"], encoder["landmark"]) == (0, "mean")
    assert blocks["H"].residual == blocks["h"].residual == "standard"
    choose = blocks["H"].mixers[1]
    assert (choose["top_k"], choose["every"]) == (1024 // 64, 64)
    assert parameters(config) < parameters(load("hsa", "mini"))


UNFIT = {
    "an ablation of a baseline": ("mini,nsa,no_bypass", "no block 'H' in the stack 'AAAA'"),
    "an option of a baseline": ("tiny,rope,mean_pool", "no chunk_encoder in the stack 'AAA'"),
    "its chunks": ("tiny,mamba2,dense_topk", "no chunk_encoder in the stack 'AAA'"),
    "tasks too late": ("tiny,nsa,tasks", "no chunk_encoder in the stack 'AAA'"),
    "two baselines": ("tiny,nsa,moba", "no block 'S' in the stack 'AAA'"),
    "no chunks": ("tiny,swa_only,noise", "no retrieval in the stack 'SSS'"),
}


@pytest.mark.parametrize(("arg", "fault"), UNFIT.values(), ids=UNFIT)
def test_variants_of_hsa_that_do_not_fit_are_refused_in_one_line(arg, fault):
    with pytest.raises(UserError) as error:
        load("hsa", arg)
    name = arg.replace(",", "-")
    assert str(error.value).startswith(f"hsa-{name}: a variant before has left {fault}, which")
    assert str(error.value).endswith("leave one of them out (tasks can come first)")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arg", ["tiny,tasks", "mini,tasks", "mini,mean_pool,dense_topk"])
def test_the_tasks_of_hsa_are_trained_and_asked(arg):
    config = load("hsa", arg)
    assert len(config.evaluation.tasks) == (7 if "tasks" in arg else 2)
    loader = make_loader(config.data, seq_len=config.seq_len, batch_size=8, seed=0)
    batches = [next(loader)["answers"] for _ in range(2)]
    loader.close()
    assert all((batch > 0).any() for batch in batches)
    for name in config.evaluation.tasks:
        exam = task_of(config, load_tokenizer("bytes"), name).exam(1, config.seq_len)
        assert exam.tokens.shape == (1, config.seq_len)


HSA = {  # window, chunk, top-k, row, steps, rows per step; as published
    "240m": (512, 64, 8, 4096, 61_440, 32),
    "345m": (512, 64, 32, 8192, 30_000, 128),
}


@pytest.mark.parametrize("preset", HSA)
def test_hsa_sizes(preset):
    config = load("hsa", preset)
    letter, blocks = config.model.blocks["S"].mixers[0], config.model.blocks
    encoder, choose = blocks["E"].mixers[0], blocks["H"].mixers[1]
    found = letter["window"], encoder["chunk_size"], choose["top_k"]
    assert (*found, config.seq_len, config.steps, config.batch_size) == HSA[preset]
    assert abs(parameters(config) / (int(preset[:-1]) * 1e6) - 1) < 0.05
    assert config.model.layers.index("E") == (len(config.model.layers) - 1) // 2
