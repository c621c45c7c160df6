"""The laws that every mixer keeps. A new mixer joins by a row in MIXERS; one of your own by

    pytest tests/mixers/test_laws.py --mixer "my_package.my_module:MyMixer,heads=4"
"""

import ast
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax import mixers
from hybridjax.config import MeshConfig, build
from hybridjax.mixers import mixer as spec_of
from hybridjax.mixers.base import Context
from hybridjax.models import block
from hybridjax.sharding import make_mesh, place, place_parameters

WIDTH = 32
HEADS = dict(heads=4, head_dim=16)


def hsa(memory, retrieval, reading=None):
    """A chunk encoder, a block that retrieves and reads, and one that reads the same chunks."""
    shape = dict(kv_heads=2, landmark_dim=8) | memory
    encoder = dict(chunk_size=4, head_dim=16, encoder_heads=2, hidden=32) | shape
    groups = shape.get("groups") or shape["kv_heads"]
    choose = spec_of("retrieval", groups=groups, landmark_dim=8, **retrieval)
    read = spec_of("hsa", **HEADS, **(reading or {}))
    blocks = block(spec_of("chunk_encoder", **encoder)), block(choose, read), block(read)
    return "stack:Stack", dict(blocks=blocks)


TABLE = {
    "attention": ("attention", HEADS),
    "attention-rope-grouped": ("attention", HEADS | dict(kv_heads=2, rope=True)),
    "attention-glm": (
        "attention",
        HEADS | dict(rope=True, rope_dim=8, rope_interleaved=True, qkv_bias=True, qk_norm=False),
    ),
    "attention-plain": ("attention", HEADS | dict(qk_norm=False, gate=False)),
    "window": ("attention", HEADS | dict(window=5, rope=True)),
    "window-1": ("attention", HEADS | dict(window=1)),
    "lightning": ("lightning", HEADS),
    "lightning-grouped-nope": ("lightning", HEADS | dict(kv_heads=2, rope=False)),
    "lightning-plain": (
        "lightning",
        HEADS | dict(qk_norm=False, gate=False, output_norm=False),
    ),
    "gated-deltanet": (  # its other options are held to Qwen3-Next's layer
        "gated_deltanet",
        dict(heads=2, head_dim=16, value_heads=4, value_dim=8, convolution=3),
    ),
    "mamba2": ("mamba2", HEADS | dict(state_dim=8, groups=2, convolution=3)),
    "stick-breaking": ("stick_breaking", HEADS | dict(kv_heads=2)),
    "moba": ("moba", HEADS | dict(kv_heads=2, chunk_size=4, top_k=3)),
    "nsa": ("nsa", HEADS | dict(kv_heads=2, chunk_size=4, top_k=3, window=6)),
    "landmark": ("landmark", HEADS | dict(kv_heads=2, chunk_size=4)),
    "hsa": hsa(dict(landmark="mean", encoder_layers=0), dict(top_k=2)),
    "hsa-cls": hsa(dict(landmark_norm=True), dict(top_k=2, norm=True)),
    "hsa-joint": hsa(
        dict(kv_heads=1, landmark="mean", encoder_layers=0),
        dict(top_k=3, weights="joint", every=2, window=8),
        dict(off_by_one=True, qk_norm=False),
    ),
    "hsa-stick": hsa(
        dict(groups=1, encoder_layers=2, key_norm=False),
        dict(top_k=2, weights="stick", recency_bias=True),
    ),
}
SLOW = (
    "attention", "attention-glm", "attention-plain", "window", "window-1", "lightning-grouped-nope",
    "lightning-plain", "mamba2", "stick-breaking", "moba", "nsa", "landmark",
    "hsa-cls", "hsa-joint", "hsa-stick",
)  # fmt: skip
BUILT = {}  # mixers that earlier tests have built
LENGTH = 17  # of most rows, so that laws share compiled programs; no multiple of a chunk
TOLERANCE = 2e-5  # of f32 outputs, relative to their size where that is above one


def pytest_generate_tests(metafunc):
    if "mixer" in metafunc.fixturenames:
        own = {name: _parse(name) for name in metafunc.config.getoption("--mixer")}
        table = TABLE | own
        rows = [
            pytest.param(row, id=name, marks=pytest.mark.slow if name in SLOW else ())
            for name, row in table.items()
        ]
        metafunc.parametrize("mixer", rows, indirect=True)


def _parse(text):
    type, *options = text.split(",")
    pairs = (option.split("=") for option in options)
    return type, {name: ast.literal_eval(value) for name, value in pairs}


@pytest.fixture
def mixer(request):
    if (name := repr(request.param)) not in BUILT:
        type, options = request.param
        spec = mixers.mixer(type, **options)
        new = jax.jit(lambda key: build(spec, mixers.MIXERS, WIDTH, key))
        BUILT[name] = new(jax.random.key(1))
    return BUILT[name]


def stream(rng, batch, length):
    return jnp.asarray(rng.normal(size=(batch, length, WIDTH)), jnp.float32)


def rows(x, **changes):
    return dataclasses.replace(Context.of_rows(x[..., 0]), **changes)


def close(actual, expected, tolerance=TOLERANCE):
    size = max(1.0, np.sqrt(np.mean(np.square(expected))))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * size)


@jax.jit
def parallel(mixer, x, ctx):
    return mixer(x, ctx)


@jax.jit
def extended(mixer, x, state, ctx):
    return mixer.extend(x, state, ctx)


def extend(mixer, x, pieces, batch_segments=None, base=None):
    """Consumes x in pieces of these lengths; returns the outputs and the last state."""
    state = mixer.init_state(x.shape[0], max(LENGTH, x.shape[1]) + 3, jnp.float32)
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        positions = state.length[:, None] + jnp.arange(length)
        segments = jnp.ones((x.shape[0], length), jnp.int32)
        if batch_segments is not None:
            segments = batch_segments[:, part]
        ctx = Context(positions, segments, base)
        y, state = extended(mixer, x[:, part], state, ctx)
        outputs.append(y)
        start += length
    return jnp.concatenate(outputs, axis=1), state


SPLITS = {"one by one": [1] * LENGTH, "uneven": [6, 1, 7, 3]}


@pytest.mark.parametrize("pieces", SPLITS.values(), ids=SPLITS.keys())
def test_1_extend_in_any_split_is_the_parallel_form(mixer, rng, pieces):
    x = stream(rng, 2, LENGTH)
    y, state = extend(mixer, x, pieces)
    close(y, parallel(mixer, x, rows(x)))
    assert state.length.tolist() == [LENGTH, LENGTH]


def test_1_extend_scales_logits_as_the_parallel_form(mixer, rng):
    x, base = stream(rng, 2, LENGTH), jnp.float32(7)
    y, _ = extend(mixer, x, [LENGTH - 8, 8], base=base)
    close(y, parallel(mixer, x, rows(x, logit_base=base)))


def test_2_no_output_depends_on_later_tokens(mixer, rng):
    x = stream(rng, 2, LENGTH)
    later = x.at[:, 9:].set(stream(rng, 2, LENGTH - 9))
    y, changed = parallel(mixer, x, rows(x)), parallel(mixer, later, rows(x))
    close(changed[:, :9], y[:, :9])
    assert not np.allclose(changed[:, 9:], y[:, 9:], atol=1e-2)


def packed(lengths, align):
    """Segments and positions of documents in one row, each at a multiple of `align`."""
    segments, positions, spans = [], [], []
    for number, length in enumerate(lengths, start=1):
        spans.append(slice(len(segments), len(segments) + length))
        gap = -length % align
        segments += [number] * length + [0] * gap
        positions += [*range(length), *[0] * gap]
    return jnp.array([segments]), jnp.array([positions]), spans


def test_3_a_packed_document_is_as_if_alone(mixer, rng):
    segments, positions, spans = packed([5, 1, 70], mixer.align)
    x = stream(rng, 1, segments.shape[1])
    cotangent = stream(rng, 1, segments.shape[1]) * (segments > 0)[..., None]

    def together(mixer, x):
        y = mixer(x, Context(positions, segments))
        return jnp.sum(y * cotangent), y

    def alone(mixer, x):
        ys = [mixer(x[:, s], rows(x[:, s])) for s in spans]
        total = sum(jnp.sum(y * cotangent[:, s]) for y, s in zip(ys, spans))
        return total, ys

    both = jax.value_and_grad(together, argnums=(0, 1), has_aux=True)
    (_, y), (grad, grad_x) = jax.jit(both)(mixer, x)
    one = jax.value_and_grad(alone, argnums=(0, 1), has_aux=True)
    (_, ys), (expected, expected_x) = jax.jit(one)(mixer, x)
    for span, expected_y in zip(spans, ys):
        close(y[:, span], expected_y)
    close(grad_x, expected_x, 1e-4)
    jax.tree.map(lambda a, b: close(a, b, 3e-4), grad, expected)


def test_4_right_padding_changes_no_output(mixer, rng):
    x = stream(rng, 2, LENGTH)
    segments = jnp.asarray([[1] * 11 + [0] * (LENGTH - 11), [1] * LENGTH])
    y = parallel(mixer, x, rows(x, segments=segments))
    close(y[0, :11], parallel(mixer, x[:1, :11], rows(x[:1, :11]))[0])
    close(y[1], parallel(mixer, x[1:], rows(x[1:]))[0])


def test_4_right_padding_changes_no_state(mixer, rng):
    """Rows of unequal progress: what follows a padded piece is as if there was no padding."""
    x = stream(rng, 2, 12)
    segments = jnp.asarray([[1] * 3 + [0] * 3 + [1] * 6, [1] * 12])
    y, state = extend(mixer, x, [6, 6], segments)
    short = jnp.concatenate([x[:1, :3], x[:1, 6:]], axis=1)
    alone, expected = extend(mixer, short, [3, 6])
    close(y[0, :3], alone[0, :3])
    close(y[0, 6:], alone[0, 3:])
    assert state.length.tolist() == [9, 12]
    _, before = extend(mixer, x, [6], segments)
    padding = Context(jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 4), jnp.int32))
    _, after = extended(mixer, stream(rng, 2, 4), before, padding)
    jax.tree.map(np.testing.assert_array_equal, after, before)


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=1, context=8),
    "data, context": MeshConfig(data=2, context=4),
    "data, tensor, context": MeshConfig(data=2, tensor=2, context=2),
}
DEFAULT = "data, tensor, context"


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, id=name, marks=() if name == DEFAULT else pytest.mark.slow)
        for name, mesh in MESHES.items()
    ],
)
def test_5_sharded_is_unsharded(mixer, rng, mesh):
    segments, positions, _ = packed([20, 44], mixer.align)  # across the borders of 8 devices
    batch = lambda a: jnp.broadcast_to(a, (8, a.shape[1]))
    segments, positions = batch(segments), batch(positions)
    x = stream(rng, 8, segments.shape[1])

    def loss(mixer, x, ctx):
        return jnp.sum(jnp.sin(mixer(x, ctx)))

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected = jax.device_get(grad(mixer, x, Context(positions, segments)))
    with jax.set_mesh(make_mesh(mesh)):
        ctx = Context(place(positions, "batch", "length"), place(segments, "batch", "length"))
        actual = grad(place_parameters(mixer), place(x, "batch", "length", None), ctx)
    jax.tree.map(lambda a, b: close(a, b, 3e-4), jax.device_get(actual), expected)


def test_6_bf16_is_near_f32(mixer, rng):
    # With chunks no more than are chosen: rounding may turn a choice, and that is not near.
    x = stream(rng, 2, 40 if mixer.align == 1 else 3 * mixer.align)
    exact = parallel(mixer, x, rows(x))
    y = parallel(mixer, x.astype(jnp.bfloat16), rows(x))
    assert y.dtype == jnp.bfloat16
    error = y.astype(jnp.float32) - exact
    assert jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact**2)) < 0.02


@pytest.mark.parametrize("length", [1, 3, 1500])
def test_7_any_length(mixer, rng, length):
    """The last outputs of a row agree with its tokens consumed in two pieces."""
    x = stream(rng, 2, length)
    y = parallel(mixer, x, rows(x))
    assert y.shape == x.shape and bool(jnp.isfinite(y).all())
    pieces = [length] if length < 2 else [length // 2, length - length // 2]
    close(extend(mixer, x, pieces)[0], y)
