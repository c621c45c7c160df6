import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import selection
from pallas_kernels.chunk_topk import chunk_topk, gradient, noise, tpu, xla
from pallas_kernels.chunk_topk.shapes import SHAPES

C = 4
PACKED = np.stack([
    np.repeat([1, 2, 0, 3, 0], [20, 13, 3, 22, 5]), np.repeat([0, 5], [7, 56])]).astype(np.int32)
PADDING = np.zeros((2, 63), np.int32)


def chunks_of(segments):
    """Ids of whole chunks, 0 where a chunk holds several documents."""
    whole = segments[:, : segments.shape[1] // C * C].reshape(len(segments), -1, C)
    return np.where((whole == whole[..., :1]).all(-1), whole[..., 0], 0)


CASES = {
    "row": dict(T=67),
    "groups": dict(T=40, G=3),
    "wide": dict(T=40, R=33, k=1),
    "packed": dict(T=63, segments=PACKED, chunk_segments=chunks_of(PACKED)),
    "padding": dict(T=63, segments=PADDING, chunk_segments=chunks_of(PADDING)),
    "window": dict(T=67, window=9),
    "window-in-documents": dict(T=63, window=6, segments=PACKED, chunk_segments=chunks_of(PACKED)),
    "short": dict(T=3, N=0),
    "incomplete": dict(T=3, N=1),
    "more-slots-than-chunks": dict(T=24, k=9),
    "decode": dict(T=1, N=50, start=np.array([150, 3], np.int32)),
    "prefill": dict(T=12, N=50, start=np.array([150, 60], np.int32)),
    "many-chunks": dict(T=140, N=300, start=np.array([1100, 300], np.int32)),
    "noise": dict(T=67, noise_key=jax.random.key(3)),
    "noise-in-documents": dict(T=63, segments=PACKED, chunk_segments=chunks_of(PACKED), G=2,
                               noise_key=jax.random.key(4)),
}  # fmt: skip


def make(name, T, N=None, G=1, R=8, k=3, **options):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    N = T // C if N is None else N
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    arrays = normal(2, T, G, R), normal(2, N, G, R)
    return arrays, normal(2, T, G, k), dict(k=k, chunk_size=C, **options)


def run(arrays, weights, options, implementation, dtype):
    """Indices, scores and the gradients by queries and landmarks."""

    def loss(arrays):
        indices, scores = chunk_topk(*arrays, **options, implementation=implementation)
        return jnp.where(indices < 0, 0, scores * weights).sum(), (indices, scores)

    arrays = [jnp.asarray(x, dtype) for x in arrays]
    (dq, dlandmarks), (indices, scores) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return dict(indices=indices, scores=scores, dq=dq, dlandmarks=dlandmarks)


@functools.cache
def expected(name, dtype="float32", **change):
    arrays, weights, options = make(name, **CASES[name] | change)
    arrays = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays]
    with jax.enable_x64(True):
        return {k: np.asarray(x) for k, x in
                run(arrays, weights, options, "reference", np.float64).items()}


def assert_close(got, want, tolerance):
    np.testing.assert_array_equal(got["indices"], want["indices"])
    empty = want["indices"] < 0
    assert np.all(np.asarray(got["scores"])[empty] == -np.inf)
    pairs = {name: (np.asarray(got[name], np.float64), want[name])
             for name in ("scores", "dq", "dlandmarks")}
    pairs["scores"] = [np.where(empty, 0, x) for x in pairs["scores"]]
    rms = lambda x: np.sqrt(np.mean(x**2)) if x.size else 0.0
    errors = {name: rms(x - y) / max(rms(y), 1e-30) for name, (x, y) in pairs.items()}
    assert all(error <= tolerance for error in errors.values()), errors


def forms(*in_one_tile):
    """Every case in small tiles; in one tile these, and if slow all."""
    return [pytest.param(name, form, marks=() if form == "small_tiles" or name in in_one_tile
                         else pytest.mark.slow, id=f"{name}-{form}")
            for name in CASES for form in ("small_tiles", "one_tile")]


@pytest.fixture
def one_tile():
    pass


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(gradient, "_FEW", 0)
    monkeypatch.setattr(selection, "_CPU_TILE", 96)
    monkeypatch.setattr(xla, "_QUERIES", 8)
    monkeypatch.setattr(xla, "_RUN", 2)


# ---------------------------------------------------------------- the oracle


def loops(q, landmarks, k, chunk_size, segments=None, chunk_segments=None, start=None, window=None,
          scale=None, noise_key=None):
    """The definition, one query at a time."""
    (B, T, G, R), N = q.shape, landmarks.shape[1]
    indices, scores = np.full((B, T, G, k), -1), np.full((B, T, G, k), -np.inf)
    for b, t, g in np.ndindex(B, T, G):
        at = t + (0 if start is None else start[b])
        ranked = []
        for i in range(N):
            visible = (i + 1) * chunk_size <= at
            if window is not None:
                visible &= i * chunk_size < at - window + 1  # it begins before the window
            if segments is not None:
                visible &= segments[b, t] == chunk_segments[b, i] != 0
            if visible:
                score = q[b, t, g] @ landmarks[b, i, g] * R**-0.5
                ranked.append((score, i))
        best = sorted(sorted(ranked, reverse=True)[:k], key=lambda pair: -pair[1])
        for j, (score, i) in enumerate(best):
            indices[b, t, g, j], scores[b, t, g, j] = i, score
    return indices, scores


@pytest.mark.parametrize("name", [name for name in CASES if "noise" not in name])
def test_reference_is_the_definition(name):
    arrays, _, options = make(name, **CASES[name])
    arrays = [x.astype(np.float64) for x in arrays]
    indices, scores = loops(*arrays, **options)
    got = expected(name)
    np.testing.assert_array_equal(got["indices"], indices)
    np.testing.assert_allclose(got["scores"], scores, rtol=1e-12)


@pytest.mark.parametrize("name", ["packed", "more-slots-than-chunks"])
def test_gradients_of_the_reference_are_finite_differences(name, rng):
    arrays, weights, options = make(name, **CASES[name])
    arrays = [x.astype(np.float64) for x in arrays]
    steps = [1e-6 * rng.standard_normal(x.shape) for x in arrays]
    with jax.enable_x64(True):
        middle, after, before = (
            run([x + n * dx for x, dx in zip(arrays, steps)], weights, options, "reference",
                np.float64) for n in (0, 1, -1))
        difference = [np.asarray(x["scores"]) for x in (after, before)]
    difference = np.subtract(*(np.where(middle["indices"] < 0, 0, x) for x in difference))
    difference = (difference * weights).sum()
    slope = sum((np.asarray(middle[f"d{name}"]) * dx).sum()
                for name, dx in zip(("q", "landmarks"), steps))
    np.testing.assert_allclose(2 * slope, difference, rtol=1e-6)


# ---------------------------------------------------------------- the implementations


@pytest.mark.parametrize("name, form", forms("packed", "noise", "more-slots-than-chunks", "decode"))
def test_xla_is_the_reference(name, form, request):
    request.getfixturevalue(form)
    arrays, weights, options = make(name, **CASES[name])
    got = run(arrays, weights, options, "xla", np.float32)
    assert (got["indices"].dtype, got["scores"].dtype) == (jnp.int32, jnp.float32)
    assert_close(got, expected(name), 1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel, small blocks of it, without a TPU."""
    monkeypatch.setattr(tpu, "target_platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "_BLOCK", 128)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield


TPU = ("many-chunks", "noise-in-documents")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TPU else pytest.mark.slow)
             for name in CASES if name != "short"])
def test_tpu_is_the_reference(name, interpreted):
    arrays, weights, options = make(name, **CASES[name])
    assert_close(run(arrays, weights, options, "tpu", np.float32), expected(name), 1e-5)


def test_tpu_gives_ties_to_the_later_chunk(interpreted):
    check_ties("tpu")


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(landmarks=np.ones((1, 2, 1, 4), np.float32)), "got bfloat16 and float32"),
        (dict(landmarks=np.ones((1, 0, 1, 4), jnp.bfloat16)), "at least one chunk"),
        (dict(k=200), "k up to 128, got 4 and 200"),
    ],
    ids=["mixed", "no-chunk", "many-slots"],
)
def test_what_the_tpu_kernel_refuses(change, reason, interpreted):
    x = np.ones((1, 8, 1, 4), jnp.bfloat16)
    arguments = dict(q=x, landmarks=x[:, :2], k=2, chunk_size=4) | change
    with pytest.raises(NotImplementedError, match=reason):
        chunk_topk(**arguments, implementation="tpu")


def test_bfloat16_inputs_cost_only_their_rounding():
    arrays, weights, options = make("packed", **CASES["packed"])
    got = run(arrays, weights, options, "xla", jnp.bfloat16)
    assert got["dq"].dtype == got["dlandmarks"].dtype == jnp.bfloat16
    assert_close(got, expected("packed", "bfloat16"), 3e-3)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_of_equal_scores_the_later_chunks_win(implementation, small_tiles):
    check_ties(implementation)


def check_ties(implementation, dtype=np.float32):
    """Among 40 chunks of three distinct scores; exact in any precision."""
    rng = np.random.default_rng(0)
    q = np.ones((1, 40, 1, 1), dtype)
    landmarks = rng.integers(0, 3, (1, 40, 1, 1)).astype(dtype)
    start = np.array([40 * C], np.int32)
    indices, _ = chunk_topk(q, landmarks, k=7, chunk_size=C, start=start,
                            implementation=implementation)
    best = np.lexsort((-np.arange(40), -landmarks[0, :, 0, 0]))[:7]
    np.testing.assert_array_equal(indices[0, -1, 0], -np.sort(-best))


@pytest.mark.slow
def test_noise_is_gumbel_and_depends_on_the_key_and_places_only():
    words = noise.words(jax.random.key(0), jnp.arange(200)[None], 2)
    sample = np.asarray(noise.gumbel(words[..., None], jnp.arange(300)), np.float64)
    assert abs(sample.mean() - np.euler_gamma) < 0.02
    assert abs(sample.std() - np.pi / 6**0.5) < 0.02
    quantiles = np.quantile(sample, [0.05, 0.5, 0.95])
    np.testing.assert_allclose(np.exp(-np.exp(-quantiles)), [0.05, 0.5, 0.95], atol=0.01)
    for x, y in itertools.combinations([sample[0, 0, 0], sample[0, 1, 0], sample[0, 0, 1]], 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.2
    neighbours = np.corrcoef(sample[0, :, 0, :-1].ravel(), sample[0, :, 0, 1:].ravel())
    assert abs(neighbours[0, 1]) < 0.02

    (q, landmarks), _, options = make("row", T=40)
    draw = lambda q, seed, **how: chunk_topk(
        q, landmarks, **options, noise_key=jax.random.key(seed), **how)[0]
    whole = draw(q, 0)
    assert np.any(whole != draw(q, 1))
    rest = draw(q[:, 23:], 0, start=np.array([23, 23], np.int32))
    np.testing.assert_array_equal(rest, whole[:, 23:])


@pytest.mark.parametrize("few", [0, 128], ids=["gathered", "products"])
def test_gradients_are_the_same_bits_every_time(few, monkeypatch):
    monkeypatch.setattr(gradient, "_FEW", few)
    arrays, weights, options = make("row", T=100)
    first, second = (run(arrays, weights, options, "xla", np.float32) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_memory_is_far_below_all_pairs():
    @functools.cache
    def peak(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 32), jnp.float32)
        landmarks = jax.ShapeDtypeStruct((1, T // 4, 1, 32), jnp.float32)

        def loss(q, landmarks):
            indices, scores = chunk_topk(q, landmarks, k=4, chunk_size=4)
            return jnp.where(indices < 0, 0, scores).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(q, landmarks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(2**15) < 2.2 * peak(2**14) + 2**22
    assert peak(2**15) < 2**15 * 2**13 * 4 / 16


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_have_the_types_of_published_shapes(name):
    shape = SHAPES[name]
    op = functools.partial(chunk_topk, k=shape.k, chunk_size=shape.chunk_size)
    indices, scores = jax.eval_shape(op, **shape.arrays(B=2))
    expected = (2, shape.T, shape.G, shape.k)
    assert (indices.shape, indices.dtype) == (expected, jnp.int32)
    assert (scores.shape, scores.dtype) == (expected, jnp.float32)


# ---------------------------------------------------------------- faults

VALID = dict(q=np.ones((2, 8, 1, 4), np.float32), landmarks=np.ones((2, 2, 1, 4), np.float32), k=2,
             chunk_size=4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=np.ones((2, 8, 4), np.float32)), "must have rank 4"),
        (dict(landmarks=np.ones((2, 2, 2, 4), np.float32)), r"landmarks must be \[2, 2, 1, 4\]"),
        (dict(landmarks=np.ones((2, 2, 1, 4), np.int32)), "landmarks must be floating point"),
        (dict(segments=np.ones((2, 8), np.int32)), "must be given together"),
        (dict(segments=np.ones((2, 8)), chunk_segments=np.ones((2, 2), np.int32)),
         "segments must be integers"),
        (dict(start=np.zeros(3, np.int32)), r"start must be \[2\]"),
        (dict(k=0), "k must be at least 1, got 0"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(window=0), "window must be at least 1, got 0"),
        (dict(implementation="best"), "'best' is unknown"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_faults_name_the_argument_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        chunk_topk(**VALID | change)
