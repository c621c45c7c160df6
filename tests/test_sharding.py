"""The table of axes; the train step on eight devices; every preset on 256 that do not exist."""

import dataclasses
import functools
import importlib
import itertools
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from hybridjax import generate, sharding
from hybridjax.config import MeshConfig, UserError, typed
from hybridjax.data.pipeline import make_loader
from hybridjax.data.sources import source
from hybridjax.evals import heldout
from hybridjax.mixers.base import Context
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import MESH_AXES, RULES, make_mesh
from hybridjax.train import make_train_step, new_model, new_state, put_batch
from hybridjax.workdir import nearest_mesh


def abstract_mesh(**sizes):
    sizes = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, (AxisType.Explicit,) * len(sizes))


# ---------------------------------------------------------------- the table


def test_axes_go_where_the_table_says():
    mesh = abstract_mesh(data=2, fsdp=4, tensor=2)
    assert RULES.spec(("batch", "length", None), (8, 6, 5), mesh) == P(("data", "fsdp"), None, None)
    assert RULES.spec(("embed", "heads"), (8, 6), mesh) == P("fsdp", "tensor")
    assert RULES.spec(("heads", "mlp"), (1, 3), abstract_mesh(data=8)) == P(None, None)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) put two dimensions .*tensor"):
        RULES.spec(("heads", "mlp"), (8, 8), abstract_mesh(tensor=2))
    with pytest.raises(ValueError, match="put two dimensions on mesh axis"):
        RULES.spec(("batch", "embed"), (8, 8), abstract_mesh(fsdp=2))


def test_a_size_that_does_not_divide_is_replicated_with_one_warning(caplog):
    sharding._warn_once.cache_clear()
    mesh = abstract_mesh(tensor=4)
    with caplog.at_level(logging.WARNING, "hybridjax"):
        for _ in range(3):
            assert RULES.spec(("embed", "heads"), (8, 6), mesh) == P(None, None)
        assert RULES.spec((None, "heads"), (8, 8), mesh) == P(None, "tensor")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["axis heads of size 6 is replicated: 4 does not divide it"]


def test_one_token_is_replicated_without_a_warning(caplog):
    sharding._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hybridjax"):
        assert RULES.spec(("batch", "length"), (8, 1), abstract_mesh(context=8)) == P(None, None)
    assert not caplog.records


def test_the_axis_over_which_rows_are_split():
    assert sharding.context_axis(64) is None
    with jax.sharding.use_abstract_mesh(abstract_mesh(data=2, context=4)):
        lengths = {length: sharding.context_axis(length) for length in (64, 62, 1)}
        parts = {length: sharding.ways("length", length) for length in lengths}
    assert lengths == {64: "context", 62: None, 1: None}
    assert parts == {64: 4, 62: 1, 1: 1}
    with jax.sharding.use_abstract_mesh(abstract_mesh(data=8)):
        assert sharding.context_axis(64) is None


MESHES = {
    "the rest": (MeshConfig(fsdp=2), (4, 2, 1, 1)),
    "all given": (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
    "another rest": (MeshConfig(data=1, tensor=-1), (1, 1, 8, 1)),
}


@pytest.mark.parametrize("config, sizes", MESHES.values(), ids=MESHES)
def test_mesh_sizes(config, sizes):
    assert tuple(make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    "config, fault",
    (
        (MeshConfig(data=3), "does not fit 8 devices: set --config.mesh.data=2 or 4$"),
        (MeshConfig(fsdp=3), "does not fit 8 devices: set --config.mesh.fsdp=2 or 4$"),
        (MeshConfig(tensor=16), "does not fit 8 devices: set --config.mesh.tensor=8$"),
        (MeshConfig(fsdp=4, tensor=3), r"\(2 are left for it\): set --config.mesh.tensor=2$"),
        (MeshConfig(data=2, fsdp=2), "uses 4 of 8 devices: set --config.mesh.data=4 or another"),
        (MeshConfig(fsdp=-1), "at most one axis may be -1"),
        (MeshConfig(tensor=0), "does not fit 8 devices: set --config.mesh.tensor=1$"),
    ),
    ids=("too few", "no divisor", "too many", "what is left", "not all", "two rests", "none"),
)
def test_a_mesh_that_does_not_fit_is_refused(config, fault):
    with pytest.raises(UserError, match=fault):
        make_mesh(config)


@pytest.mark.parametrize(
    "trained, here",
    (
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=64, tensor=2), (1, 4, 2, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=3, context=16), (1, 1, 1, 8)),
    ),
    ids=("fits", "a part", "no part"),
)
def test_a_model_that_was_trained_elsewhere_gets_the_nearest_mesh(trained, here, caplog):
    assert tuple(nearest_mesh(trained).shape.values()) == here
    assert len(caplog.messages) == (here != (8, 1, 1, 1))


# ---------------------------------------------------------------- numbers on eight devices


def train(config, mesh, steps=3, optimizer=None):
    """(losses, state) of a few steps."""
    with jax.set_mesh(mesh):
        optimizer = optimizer or optimizer_of(config)
        state = jax.jit(lambda: new_state(config, optimizer))()
        step, losses = make_train_step(optimizer, config), []
        for batch in batches(config, steps):
            state, scalars = step(state, put_batch(batch))
            losses.append(float(scalars["loss"]))
        return losses, state


def optimizer_of(config):
    model = jax.eval_shape(lambda: new_model(config))
    return make_optimizer(config.optimizer, config.steps, model)


def batches(config, count):
    loader = make_loader(
        config.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
    )
    return [next(loader) for _ in range(count)]


def tiny(**changes):
    """Grouped queries, and a repeated group so that there is something to scan."""
    config = micro.micro()
    config.update(batch_size=8)
    config.optimizer.name = changes.pop("optimizer", "adamw")
    config.model.layers = "LALA"
    for block in config.model.blocks.values():
        block.mixers[0].update(heads=4, kv_heads=2)
    config.model.blocks.A.mixers[0].rope = changes.pop("rope", False)
    config.model.update(changes.pop("model", {}))
    config.update(changes)
    return typed(config)


@pytest.fixture(scope="module")
def alone():
    return train(tiny(), make_mesh(MeshConfig(), jax.devices()[:1]))


SHARDED = {
    "data": (MeshConfig(data=8), {}),
    "fsdp": (MeshConfig(data=1, fsdp=8), {"embed": 8}),
    "tensor": (MeshConfig(data=2, tensor=4), {"heads": 4, "mlp": 4, "vocab": 4}),
    "all": (
        MeshConfig(data=2, fsdp=2, tensor=2),
        {"embed": 2, "heads": 2, "mlp": 2, "vocab": 2},
    ),
}


@pytest.mark.parametrize(
    "mesh, parts",
    [
        pytest.param(*case, id=name, marks=() if name == "all" else pytest.mark.slow)
        for name, case in SHARDED.items()
    ],
)
def test_a_sharded_run_takes_the_same_steps(alone, mesh, parts):
    losses, state = train(tiny(), make_mesh(mesh))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        if leaf.ndim:
            assert_split(path, leaf, parts)
    kernel = state.model.groups[0][0].mlp.up.kernel
    assert split(kernel[...]) == (1, parts.get("embed", 1), parts.get("mlp", 1))
    assert split(state.model.embedding.table[...]) == (parts.get("vocab", 1), parts.get("embed", 1))


def split(x):
    """In how many parts each dimension is laid over the devices."""
    shard = x.addressable_shards[0].data
    return tuple(whole // part for whole, part in zip(x.shape, shard.shape, strict=True))


def assert_split(path, moment, parts):
    name = jax.tree_util.keystr(path)
    ways = {"kernel": ("embed", "heads", "mlp"), "table": ("vocab", "embed")}
    for kind, axes in ways.items():
        if kind in name:
            found = sorted(n for n in split(moment) if n > 1)
            possible = {parts.get(axis, 1) for axis in axes} - {1}
            assert set(found) == possible, (name, found, possible)


@pytest.mark.slow
def test_muon_takes_the_same_steps_on_a_mesh():
    config = tiny(optimizer="muon")
    losses = train(config, make_mesh(MeshConfig(), jax.devices()[:1]))[0]
    sharded = train(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))[0]
    np.testing.assert_allclose(sharded, losses, rtol=1e-5)


@pytest.mark.slow
def test_unrolled_layers_take_the_same_steps(alone):
    config = tiny(model=dict(scan=False))
    losses, _ = train(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-6)


@pytest.mark.parametrize(
    "devices", (1, pytest.param(2, marks=pytest.mark.slow)), ids=("one device", "two devices")
)
def test_accumulation_gives_the_gradient_of_the_whole_batch(devices):
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    descent, one = optax.scale(-1.0), dict(z_loss=1e-3, model=dict(layers="L"))
    losses, state = train(tiny(**one), mesh, 1, descent)
    parts, split = train(tiny(accumulate=4, **one), mesh, 1, descent)
    np.testing.assert_allclose(parts, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        split.model,
        state.model,
    )


# ---------------------------------------------------------------- rows split over devices

LENGTH = 64
STACKS = {"HypeNet": "LALA", "Transformer": "AA"}


def packed(layers):
    """Rows of several documents with padding behind, besides rows of one. Few tokens have much
    weight, so that the order in which their losses are summed shows less than 1e-6."""
    sources = dict(snippets=source("micro:Snippets"))
    data = dict(tokenizer="bytes", sources=sources, packing="best_fit")
    model = dict(layers=STACKS.get(layers, layers))
    return tiny(model=model, rope=layers == "Transformer", data=data, seq_len=LENGTH, steps=10)


def test_documents_cross_the_borders_of_devices():
    segments = np.concatenate([batch["segments"] for batch in batches(packed("L"), 10)])
    several = segments.max(axis=1) > 1
    for part in (LENGTH // devices for devices in (2, 4, 8)):
        before, behind = segments[:, part - 1 : -1 : part], segments[:, part::part]
        assert np.any((before == behind) & (before > 0) & several[:, None])
    assert 0 < np.sum(several) < len(several) and np.any(segments == 0)


SPLIT = {
    "context": MeshConfig(data=1, context=8),
    "data, tensor, context": MeshConfig(data=2, tensor=2, context=2),
    "fsdp, context": MeshConfig(data=1, fsdp=2, context=4),
    "data, context": MeshConfig(data=2, context=4),
    "tensor, context": MeshConfig(data=1, tensor=2, context=4),
    "data, fsdp, context": MeshConfig(data=2, fsdp=2, context=2),
    "fsdp, tensor, context": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    "more data, context": MeshConfig(data=4, context=2),
    "more fsdp, context": MeshConfig(data=1, fsdp=4, context=2),
    "more tensor, context": MeshConfig(data=1, tensor=4, context=2),
    "no context": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers, mesh",
    [
        pytest.param(layers, mesh, id=f"{layers} {name}")
        for layers in STACKS
        for name, mesh in SPLIT.items()
    ],
)
def test_ten_steps_with_rows_split_over_devices(layers, mesh):
    losses, gradients = ten_steps(layers, make_mesh(mesh))
    expected, expected_gradients = ten_steps_alone(layers)
    assert abs(losses[0] / expected[0] - 1) < 1e-6
    assert abs(losses[-1] / expected[-1] - 1) < 1e-4
    far = jax.tree.map(distance, gradients, expected_gradients)
    assert max(jax.tree.leaves(far)) < 1e-5, far


@functools.cache
def ten_steps_alone(layers):
    return ten_steps(layers, make_mesh(MeshConfig(), jax.devices()[:1]))


def ten_steps(layers, mesh):
    """The losses, and the gradients of the first step."""
    config, gradients = packed(layers), None
    with jax.set_mesh(mesh):
        optimizer = optax.chain(optax.trace(decay=0), optimizer_of(config))  # keeps the gradient
        state = jax.jit(lambda: new_state(config, optimizer))()
        step, losses = make_train_step(optimizer, config), []
        for batch in batches(config, 10):
            state, scalars = step(state, put_batch(batch))
            losses.append(float(scalars["loss"]))
            gradients = gradients or jax.device_get(state.opt_state[0].trace)
    return losses, gradients


def distance(x, y):
    """Root mean square of the difference, relative to y's."""
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ("LL",))
def test_measuring_and_generating_with_rows_split_over_devices(rng, layers):
    """Of lengths that 8 devices divide and do not, and of prompts that end anywhere."""
    config = packed(layers)
    rows = rng.integers(1, 256, size=(1, 1 + LENGTH)).astype(np.int32)
    prompts = [rng.integers(1, 256, size=n).astype(np.int32) for n in (29, 11)]

    def results(model):
        nats = []
        for length in (LENGTH, LENGTH - 4):
            ctx = Context.of_rows(rows[:, :length], logit_base=jnp.float32(8))
            nats.append(heldout._nats(model, rows[:, : length + 1], ctx))
        state = generate.new_state(model, len(prompts), LENGTH)
        prefix = generate.prefill(model, prompts, state, piece=16)
        logits = np.asarray(prefix[1])
        greedy = functools.partial(generate.sample, temperature=0.0)
        words = generate.decode(model, prefix, jax.random.key(0), greedy)
        return [*map(np.asarray, nats), logits, *itertools.islice(words, 3)]

    expected = results(new_model(config))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=8))):
        found = results(jax.jit(lambda: new_model(config))())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_no_device_holds_a_whole_row():
    """In the program of a train step: no array is as long as a row, and none is gathered."""
    config = packed("LLLL")
    mesh = make_mesh(MeshConfig(data=1, context=8))
    config = dataclasses.replace(config, seq_len=8 * 72, batch_size=1)  # no other size is n * 576
    with jax.set_mesh(mesh):
        optimizer = optimizer_of(config)
        state = jax.eval_shape(lambda: new_state(config, optimizer))
        program = make_train_step(optimizer, config).lower(state, batch_of(config, mesh))
        text = program.compile().as_text()
    shapes = {shape for shape in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)}
    sizes = {int(size) for shape in shapes for size in shape.split(",")}
    assert 72 in sizes and not {size for size in sizes if size and size % config.seq_len == 0}
    assert "collective-permute" in text and "all-to-all" not in text
    gathered = re.findall(r"= (\w+)\[[^=]* all-gather\(", text)
    assert set(gathered) == {"s32"}  # the documents at the borders


# ---------------------------------------------------------------- 256 devices

FILES = [p.stem for p in sorted(pathlib.Path("configs").glob("[!_]*.py"))]
PRESETS = [
    (file, preset)
    for file in FILES
    if file != "halo"  # of another command
    for preset in getattr(importlib.import_module(f"configs.{file}"), "PRESETS", ())
]
LARGE = {
    "data, tensor": dict(data=64, tensor=4),
    "fsdp": dict(fsdp=256),
    "data, fsdp, tensor": dict(data=4, fsdp=16, tensor=4),
    "data, context": dict(data=32, context=8),
    "fsdp, tensor, context": dict(fsdp=16, tensor=4, context=4),
}


LARGEST = ("9b", "345m", "qwen3-next-shape")  # of each file


@pytest.mark.parametrize(
    "file, preset, mesh",
    [
        pytest.param(
            file, preset, mesh, id=f"{file}:{preset}-{name}",
            marks=() if preset in LARGEST and "fsdp, tensor, context" == name else pytest.mark.slow,
        )
        for file, preset in PRESETS
        for name, mesh in LARGE.items()
    ],
)  # fmt: skip
def test_every_preset_type_checks_on_256_devices(file, preset, mesh):
    module = importlib.import_module(f"configs.{file}")
    config = typed(module.get_config(f"{preset},batch_size=256"))

    with jax.sharding.use_abstract_mesh(abstract_mesh(**mesh)):
        optimizer = optimizer_of(config)
        state = jax.eval_shape(lambda: new_state(config, optimizer))
        batch = batch_of(config, jax.sharding.get_abstract_mesh())
        after, scalars = jax.eval_shape(make_train_step(optimizer, config), state, batch)
    placed = lambda x: (x.shape, x.dtype, x.ndim and x.sharding)
    assert list(map(placed, jax.tree.leaves(after))) == list(map(placed, jax.tree.leaves(state)))
    largest = max(jax.tree.leaves(state), key=lambda x: x.size)
    whole = largest.sharding.shard_shape(largest.shape) == largest.shape
    cuts = config.model.width >= 256 and {"fsdp", "tensor"} & mesh.keys()  # too narrow else
    assert not (whole and cuts)
    assert scalars["loss"].shape == ()


def batch_of(config, mesh):
    """The shapes and places of a batch."""
    shape = (config.batch_size, config.seq_len)
    placed = jax.NamedSharding(mesh, sharding.current_spec(("batch", "length"), shape))
    dtypes = dict.fromkeys(("tokens", "targets", "segments", "positions", "answers"), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        for name, dtype in (dtypes | {"loss_weights": jnp.float32}).items()
    }
