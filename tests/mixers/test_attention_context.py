"""Attention where rows and caches are split over devices: equal to one device, and in parts."""

import re

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from hybridjax.config import MeshConfig, typed
from hybridjax.mixers.attention import Attention
from hybridjax.mixers.base import Context
from hybridjax.models import block, mixer, mlp
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import context_axis, make_mesh, named_sharding, place, place_parameters
from hybridjax.train import make_train_step, new_model, new_state

WIDTH = 32
ATTENTION = {
    "full": dict(),
    "grouped": dict(kv_heads=2, rope=True),
    "window": dict(window=4, rope=True),
    "window over several": dict(window=15, kv_heads=1),
}
MESHES = {
    "context": MeshConfig(data=1, context=8),
    "data": MeshConfig(data=2, context=4),
    "tensor": MeshConfig(data=2, tensor=2, context=2),
    "few heads": MeshConfig(data=1, tensor=4, context=2),  # fewer K/V heads than devices
}
DEFAULT = {("full", "context"), ("grouped", "few heads"), ("window", "data")}
CASES = [
    pytest.param(
        options, mesh, id=f"{name}-{where}",
        marks=() if (name, where) in DEFAULT else pytest.mark.slow,
    )
    for name, options in ATTENTION.items()
    for where, mesh in MESHES.items()
]  # fmt: skip


def attention(**options):
    return Attention(WIDTH, jax.random.key(1), heads=4, head_dim=8, **options)


def close(actual, expected, tolerance=1e-5):
    """The root mean square of the difference, relative to what is expected."""
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
    error = rms(np.asarray(actual) - np.asarray(expected))
    assert error <= tolerance * (rms(expected) or 1), error


def rows(rng, batch=2, length=48):
    """A stream and its context: documents that cross the borders of shards, and padding."""
    lengths = [length // 2 + 1, 1, length // 4, length // 4 - 2]
    segments = np.tile(np.repeat([1, 2, 3, 0], lengths), (batch, 1))
    positions = np.concatenate([np.arange(n) for n in lengths])
    x = rng.normal(size=(batch, length, WIDTH)).astype(np.float32)
    return x, np.tile(positions, (batch, 1)), segments


@jax.jit
def gradients(mixer, x, ctx, window=None):
    def loss(mixer, x):
        y = mixer(x, ctx, window)
        return jnp.sum(jnp.sin(y) * (ctx.segments > 0)[..., None]), y

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(mixer, x)


def on_mesh(mesh, mixer, x, positions, segments, *window):
    with jax.set_mesh(make_mesh(mesh)):
        assert context_axis(x.shape[1]) == "context"
        ctx = Context(place(positions, "batch", "length"), place(segments, "batch", "length"))
        return jax.device_get(
            gradients(place_parameters(mixer), place(x, "batch", "length", None), ctx, *window)
        )


@pytest.mark.parametrize("options, mesh", CASES)
def test_split_rows_are_whole_rows(options, mesh, rng):
    mixer, (x, positions, segments) = attention(**options), rows(rng)
    expected = gradients(mixer, x, Context(positions, segments))
    jax.tree.map(close, on_mesh(mesh, mixer, x, positions, segments), expected)


@pytest.mark.slow
def test_split_rows_with_a_traced_window(rng):
    mixer, (x, positions, segments), window = attention(), rows(rng), jnp.asarray(7)
    expected = gradients(mixer, x, Context(positions, segments), window)
    got = on_mesh(MESHES["data"], mixer, x, positions, segments, window)
    jax.tree.map(close, got, expected)


# ---------------------------------------------------------------- caches


@jax.jit
def extend(mixer, x, state, ctx):
    return mixer.extend(x, state, ctx)


def extended(mixer, x, lengths):
    """Pieces of which each row reads so many tokens; outputs of the real ones, and the state."""
    state, start, outputs = mixer.init_state(x.shape[0], 16, jnp.float32), 0, []
    for piece in lengths:
        longest = max(piece)
        part = place(x[:, start : start + longest], "batch", None, None)
        positions = state.length[:, None] + jnp.arange(longest)
        segments = place((np.arange(longest) < np.array(piece)[:, None]) * 1, "batch", None)
        y, state = extend(mixer, part, state, Context(positions, segments))
        outputs.append(np.asarray(y) * np.asarray(segments)[..., None])
        start += longest
    return np.concatenate(outputs, axis=1), state


PIECES = [(8, 3), (1, 1), (4, 4), (1, 1)]  # within a part of the cache and across borders


@pytest.mark.parametrize("options, mesh", CASES)
def test_split_caches_are_whole_caches(options, mesh, rng):
    mixer, x = attention(**options), rng.normal(size=(2, 14, WIDTH)).astype(np.float32)
    y, state = extended(mixer, x, PIECES)
    with jax.set_mesh(make_mesh(mesh)):
        sharded_y, sharded = extended(place_parameters(mixer), x, PIECES)
    close(sharded_y, y)
    devices, kv_heads = mesh.tensor, state.keys.shape[2]
    repeats = max(1, devices // kv_heads)  # a head for every device along tensor
    of_each = lambda x: x if x.ndim == 1 else x[:, :, ::repeats]
    jax.tree.map(lambda x, y: close(of_each(x), y), jax.device_get(sharded), state)
    part = sharded.keys.addressable_shards[0].data
    assert part.shape[2] == kv_heads * repeats // devices
    ways = 1 if "window" in options else mesh.context
    assert part.shape[1] == state.keys.shape[1] // ways


# ---------------------------------------------------------------- a whole stack

LENGTH = 8 * 72


def train_step(mesh):
    """(compiled step, its first scalars) of two scanned, rematerialised layers."""
    config = micro.micro()
    config.update(batch_size=1, seq_len=LENGTH)
    rotary = mixer("attention", heads=2, head_dim=8, rope=True)
    config.model.update(layers="AA", remat="names")
    config.model.blocks.A = block(rotary, mlp=mlp("swiglu", hidden=32))
    config = typed(config)
    tokens = np.arange(LENGTH, dtype=np.int32)[None]
    batch = dict(tokens=tokens % 251, targets=(tokens + 1) % 251, positions=tokens % 500)
    batch |= dict(segments=1 + tokens // 500, answers=0 * tokens)
    batch["loss_weights"] = np.ones((1, LENGTH), np.float32)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: new_model(config))
        optimizer = make_optimizer(config.optimizer, config.steps, abstract)
        state = jax.jit(lambda: new_state(config, optimizer))()
        sharding = named_sharding(("batch", "length"), tokens.shape)
        batch = {name: jax.device_put(x, sharding) for name, x in batch.items()}
        compiled = make_train_step(optimizer, config).lower(state, batch).compile()
        return compiled, compiled(state, batch)[1]


@pytest.mark.slow
def test_a_train_step_holds_nothing_of_the_whole_length():
    compiled, scalars = train_step(make_mesh(MESHES["context"]))
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    sizes = {int(size) for shape in shapes for size in shape.split(",")}
    assert LENGTH // 8 in sizes and not {n for n in sizes if n and n % LENGTH == 0}
    _, expected = train_step(make_mesh(MeshConfig(), jax.devices()[:1]))
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(scalars[name], expected[name], rtol=1e-5)
