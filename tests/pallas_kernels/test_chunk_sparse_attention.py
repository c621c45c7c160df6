import contextlib
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import selection
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention, tpu, tpu_kernels, xla
from pallas_kernels.chunk_sparse_attention.gathered import attend_chunks
from pallas_kernels.chunk_sparse_attention.shapes import SHAPES

CASES = {
    "one-group": dict(H=4),
    "16-to-1": dict(H=16, K=8, V=8, C=16),
    "groups-of-2": dict(H=4, G=2),
    "groups-of-1": dict(H=3, G=3),
    "wide-values": dict(H=2, K=3, V=9),
    "joint": dict(H=4, joint=True),
    "joint-groups": dict(H=4, G=2, joint=True, C=16),
    "off-by-one": dict(H=2, off_by_one=True),
    "joint-off-by-one": dict(H=2, joint=True, off_by_one=True),
    "large-logits": dict(H=2, scale=40.0),
    "large-logits-off-by-one": dict(H=2, scale=40.0, off_by_one=True),
    "one-token": dict(T=1, H=2),
    "one-chunk": dict(T=9, N=1, J=1, H=2),
    "no-chunk": dict(T=9, H=2, empty=1.0),
    "no-chunk-joint": dict(T=9, H=2, empty=1.0, joint=True),
    "no-memory": dict(T=3, N=0, H=2),
    "own-chunk": dict(H=4, G=2, joint=True, own=True),
    "own-chunk-weighted": dict(H=2, own=True, off_by_one=True),
    "popular-chunk": dict(T=150, H=2, popular=True),
}
DTYPES = {"float32": dict.fromkeys(("o", "dq", "dk", "dv", "dweights"), 1e-5),
          "bfloat16": dict(o=0.005, dq=0.008, dk=0.008, dv=0.008, dweights=0.02)}


def make(name, T=21, N=5, H=2, G=1, K=5, V=5, J=3, C=8, empty=0.2, joint=False, popular=False,
         own=False, **options):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    normal = lambda *shape: rng.standard_normal(shape)
    order = np.argsort(rng.random((2, T, G, N)), axis=-1)
    if popular:
        order = np.where(order == 3, -1, order)
        order = np.where(np.sort(order, -1) < 0, 3, np.sort(order, -1))
    indices = np.full((2, T, G, J), -1, np.int32)
    indices[..., :min(J, N)] = order[..., :J]
    indices[rng.random(indices.shape) < empty] = -1
    indices[:, 5::6] = -1  # queries without a chunk
    arrays = dict(q=normal(2, T, H, K), k=normal(2, N * C, G, K), v=normal(2, N * C, G, V))
    if not joint:
        arrays["weights"] = rng.random((2, T, G, J))
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    options = dict(chunk_size=C, **options)
    if own:  # queries stand within the memory, and choose chunks before, at and after their place
        options["index"] = np.tile(np.arange(T, dtype=np.int32) + N * C - T - 5, (2, 1))
    return arrays, -np.sort(-indices, axis=-1), normal(2, T, H, V).astype(np.float32), options


def run(arrays, indices, do, options, implementation):
    """Outputs and the gradient by each array."""

    def loss(arrays):
        o = chunk_sparse_attention(
            **arrays, indices=indices, **options, implementation=implementation)
        return (o * do.astype(o.dtype)).sum(), o

    gradients, o = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return dict(o=o) | {f"d{name}": x for name, x in gradients.items()}


def narrowed(arrays, dtype):
    return {name: jnp.asarray(x, "float32" if name == "weights" else dtype)
            for name, x in arrays.items()}


@functools.cache
def expected(name, dtype, **change):
    arrays, indices, do, options = make(name, **CASES[name] | change)
    with jax.enable_x64(True):
        wide = {key: np.asarray(x, np.float64) for key, x in narrowed(arrays, dtype).items()}
        got = run(wide, indices, np.asarray(jnp.asarray(do, dtype), np.float64), options,
                  "reference")
        return {key: np.asarray(x) for key, x in got.items()}


def assert_close(got, want, dtype):
    rms = lambda x: np.sqrt(np.mean(np.asarray(x, np.float64) ** 2)) if x.size else 0.0
    assert got.keys() == want.keys()
    largest = max(rms(x) for key, x in want.items() if key != "o")
    errors = {key: rms(np.asarray(got[key], np.float64) - x) / max(rms(x), 1e-3 * largest, 1e-30)
              for key, x in want.items()}
    assert all(errors[key] <= DTYPES[dtype][key] for key in errors), errors


def forms(*in_one_tile):
    """Every case in small tiles; these in the other forms too, and if slow all."""
    return [pytest.param(name, form, marks=() if form == "small_tiles" or name in in_one_tile
                         else pytest.mark.slow, id=f"{name}-{form}")
            for name in CASES for form in ("small_tiles", "one_tile", "all_chunks")]


@pytest.fixture
def one_tile(monkeypatch):
    monkeypatch.setattr(xla, "_FEW", 0)


@pytest.fixture
def small_tiles(one_tile, monkeypatch):
    monkeypatch.setattr(selection, "_CPU_TILE", 900)
    monkeypatch.setattr(selection, "_PAIRS", 8)


@pytest.fixture
def all_chunks(monkeypatch):
    """Attention over all chunks, the others with weight 0."""
    monkeypatch.setattr(selection, "_CPU_TILE", 900)


# ---------------------------------------------------------------- the oracle


def loops(q, k, v, weights, indices, chunk_size, scale=None, off_by_one=False, index=None):
    """The definition, one query and head at a time."""
    (B, T, H, K), G = q.shape, k.shape[2]
    o = np.zeros((B, T, H, v.shape[-1]))
    scale = K**-0.5 if scale is None else scale

    def attend(b, t, h, g, keys):
        keys = keys if index is None else keys[keys <= index[b, t]]
        if not keys.size:
            return 0
        logits = scale * k[b, keys, g] @ q[b, t, h]
        base = max(logits.max(), 0)
        p = np.exp(logits - base)
        return p / (p.sum() + off_by_one * np.exp(-base)) @ v[b, keys, g]

    for b, t, h in np.ndindex(B, T, H):
        g = h // (H // G)
        slots = np.flatnonzero(indices[b, t, g] >= 0)
        keys = [indices[b, t, g, j] * chunk_size + np.arange(chunk_size) for j in slots]
        if weights is None and keys:
            o[b, t, h] = attend(b, t, h, g, np.concatenate(keys))
        elif keys:
            o[b, t, h] = sum(weights[b, t, g, j] * attend(b, t, h, g, key)
                             for j, key in zip(slots, keys))
    return o


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    arrays, indices, _, options = make(name, **CASES[name])
    wide = {key: x.astype(np.float64) for key, x in arrays.items()}
    o = loops(**{"weights": None} | wide, indices=indices, **options)
    np.testing.assert_allclose(expected(name, "float32")["o"], o, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["groups-of-2", "joint-off-by-one"])
def test_gradients_of_the_reference_are_finite_differences(name, rng):
    arrays, indices, do, options = make(name, **CASES[name])
    with jax.enable_x64(True):
        op = jax.jit(functools.partial(
            chunk_sparse_attention, indices=indices, **options, implementation="reference"))
        wide = {key: x.astype(np.float64) for key, x in arrays.items()}
        step = {key: 1e-6 * rng.standard_normal(x.shape) for key, x in wide.items()}
        after, before = (np.asarray(op(**{key: x + sign * step[key] for key, x in wide.items()}))
                         for sign in (1, -1))
    gradients = expected(name, "float32")
    slope = sum((gradients[f"d{key}"] * x).sum() for key, x in step.items())
    np.testing.assert_allclose(2 * slope, ((after - before) * do).sum(), rtol=1e-6)


# ---------------------------------------------------------------- the implementations


@pytest.mark.parametrize("name, form", forms("16-to-1", "joint-groups", "one-chunk"))
def test_xla_is_the_reference(name, form, request):
    request.getfixturevalue(form)
    arrays, indices, do, options = make(name, **CASES[name])
    got = run(narrowed(arrays, "float32"), indices, do, options, "xla")
    assert_close(got, expected(name, "float32"), "float32")


@pytest.mark.parametrize("name", ["16-to-1", "joint-groups"])
def test_bfloat16_costs_a_few_roundings(name):
    arrays, indices, do, options = make(name, **CASES[name])
    got = run(narrowed(arrays, "bfloat16"), indices, do, options, "xla")
    assert got["o"].dtype == got["dk"].dtype == jnp.bfloat16
    assert_close(got, expected(name, "bfloat16"), "bfloat16")


TPU = {("joint-off-by-one", "float32"), ("16-to-1", "bfloat16")}


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernels, several tiles of them, without a TPU."""
    monkeypatch.setattr(tpu, "target_platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "_capacity", lambda: 100 * 2**20)
    monkeypatch.setattr(tpu, "_TILE", 8)
    monkeypatch.setattr(tpu_kernels, "SLOTS", 8)
    monkeypatch.setattr(tpu_kernels, "_ADDED", 2)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield


@pytest.mark.parametrize(
    "name, dtype",
    [pytest.param(name, dtype, marks=() if (name, dtype) in TPU else pytest.mark.slow)
     for name, dtype in [*((name, "float32") for name in CASES
                         if name != "no-memory" and "own" not in name),
                         ("16-to-1", "bfloat16"), ("joint-groups", "bfloat16")]],
)
def test_tpu_is_the_reference(name, dtype, interpreted, monkeypatch):
    monkeypatch.setattr(tpu, "_matrix_width", lambda: 16)  # two slots, or one, side by side
    arrays, indices, do, options = make(name, **CASES[name])
    got = run(narrowed(arrays, dtype), indices, do, options, "tpu")
    assert_close(got, expected(name, dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("change", [{}, dict(J=16, N=20), dict(J=40, N=41, C=16)], ids=str)
def test_all_widths_of_the_matrix_unit_give_the_reference(change, width, interpreted, monkeypatch):
    monkeypatch.setattr(tpu, "_matrix_width", lambda: width)
    arrays, indices, do, options = make("16-to-1", **CASES["16-to-1"] | change)
    got = run(narrowed(arrays, "float32"), indices, do, options, "tpu")
    assert_close(got, expected("16-to-1", "float32", **change), "float32")


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(index=True), "sees whole chunks, and takes no index"),
        (dict(q_dtype="float32"), "all bfloat16 or all float32, got float32, bfloat16, bfloat16"),
        (dict(chunk_size=24), "chunk_size a multiple of 16, got 24"),
        (dict(J=200), "at most 128 slots, got 200"),
        (dict(T=2**20), "keeps keys and values in VMEM: 1048576 of them need .* MiB of 100"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_what_the_tpu_kernels_refuse(change, reason, interpreted):
    change = dict(change)
    dtype, index = change.pop("q_dtype", "bfloat16"), change.pop("index", None)
    shape = SHAPES["hsa-240m"]._replace(**dict(T=24 * 64) | change)
    arrays = shape.arrays(B=1)
    arrays["q"] = jax.ShapeDtypeStruct(arrays["q"].shape, dtype)
    if index:
        arrays["index"] = jax.ShapeDtypeStruct(arrays["q"].shape[:2], "int32")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(
            chunk_sparse_attention, chunk_size=shape.chunk_size, implementation="tpu"), **arrays)


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_have_the_types_of_published_shapes(name):
    arrays, C = SHAPES[name].arrays(B=2), SHAPES[name].chunk_size
    indices = arrays.pop("indices")

    def loss(arrays, indices):
        o = chunk_sparse_attention(**arrays, indices=indices, chunk_size=C)
        return o.astype(jnp.float32).sum(), o

    gradients, o = jax.eval_shape(jax.grad(loss, has_aux=True), arrays, indices)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(gradients) == types(arrays) and types(o) == types(arrays["q"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_queries_without_a_chunk_return_0_and_have_no_gradient(implementation):
    arrays, indices, do, options = make("one-group", **CASES["one-group"])
    got = run(arrays, indices, do, options, implementation)
    none = (indices < 0).all((2, 3))
    assert none.any() and not np.any(got["o"][none]) and not np.any(got["dq"][none])
    assert not np.any(got["dweights"][indices < 0])
    poisoned = arrays | {"weights": np.where(indices < 0, np.nan, arrays["weights"])}
    poisoned["q"] = np.where(none[..., None, None], 1e4, arrays["q"])
    for x, y in zip(run(poisoned, indices, do, options, implementation).values(), got.values()):
        np.testing.assert_array_equal(x, y)


def test_gradients_are_the_same_bits_every_time():
    arrays, indices, do, options = make("popular-chunk", **CASES["popular-chunk"])
    first, second = (run(arrays, indices, do, options, "xla") for _ in range(2))
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["groups-of-2", "joint-off-by-one", "no-chunk"])
def test_chunks_already_fetched(name):
    """The same, with its gradients, of chunks gathered outside; empty slots hold anything."""
    arrays, indices, do, options = make(name, **CASES[name])
    B, T, G, J = indices.shape
    C = options.pop("chunk_size")

    def op(q, k, v, weights=None):
        at = indices[..., None] * C + np.arange(C)
        fetch = lambda x: jnp.where(
            indices[..., None, None] < 0, 1e30,
            x[np.arange(B)[:, None, None, None, None], at, np.arange(G)[:, None, None]])
        return attend_chunks(q, fetch(k), fetch(v), indices, weights, **options)

    gradients = jax.jit(jax.grad(lambda arrays: (op(**arrays) * do).sum()))(arrays)
    got = dict(o=op(**arrays)) | {f"d{key}": x for key, x in gradients.items()}
    assert_close(got, expected(name, "float32"), "float32")


def test_memory_does_not_hold_the_chosen_keys_or_all_pairs():
    J, C, K = 8, 16, 32

    @functools.cache
    def peak(T):
        array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        x, kv = array(1, T, 4, K), array(1, T, 1, K)
        slots = array(1, T, 1, J), array(1, T, 1, J, dtype=jnp.int32)
        loss = lambda q, k, v, w, indices: chunk_sparse_attention(
            q, k, v, indices, w, chunk_size=C).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, kv, kv, *slots).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    slope = (peak(32768) - peak(16384)) / 16384
    assert slope < J * C * K * 4 / 4  # bytes per token: far below its chosen keys
    assert peak(32768) < 2.2 * peak(16384)


# ---------------------------------------------------------------- faults

ones = lambda *shape: np.ones(shape, np.float32)
VALID = dict(q=ones(2, 5, 4, 3), k=ones(2, 8, 2, 3), v=ones(2, 8, 2, 6), chunk_size=4,
             indices=np.zeros((2, 5, 2, 1), np.int32), weights=ones(2, 5, 2, 1))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=ones(2, 5, 4)), "q must have rank 4"),
        (dict(k=ones(2, 8, 2, 4)), r"k must be \[2, 8, 2, 3\]"),
        (dict(v=ones(2, 7, 2, 6)), r"v must be \[2, 8, 2, 6\]"),
        (dict(q=ones(2, 5, 3, 3)), "multiple of key/value heads, got 3 and 2"),
        (dict(indices=np.zeros((2, 5, 1, 1), np.int32)), r"indices must be \[2, 5, 2, 1\]"),
        (dict(indices=ones(2, 5, 2, 1)), "indices must be integers, got float32"),
        (dict(weights=ones(2, 5, 2, 2)), r"weights must be \[2, 5, 2, 1\]"),
        (dict(index=np.zeros((2, 4), int)), r"index must be \[2, 5\]"),
        (dict(indices=np.full((2, 5, 2, 1), 2, np.int32)), "chunks from 0 to 1.*from 2 to 2"),
        (dict(indices=np.full((2, 5, 2, 1), -2, np.int32)), "from -2 to -2"),
        (dict(chunk_size=3), "whole chunks, got 8 keys and chunk_size 3"),
        (dict(implementation="best"), "'best' is unknown"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_faults_name_the_argument_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        chunk_sparse_attention(**VALID | change)


@pytest.mark.parametrize("chunk, fault", [(1, None), (2, "from 2 to 2")])
def test_indices_that_a_compiled_function_closes_over(chunk, fault):
    indices = jnp.full((2, 5, 2, 1), chunk, jnp.int32)
    f = jax.jit(lambda q: chunk_sparse_attention(**VALID | dict(q=q, indices=indices)))
    with pytest.raises(ValueError, match=fault) if fault else contextlib.nullcontext():
        f(VALID["q"])
