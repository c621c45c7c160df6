import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention, xla


def documents(*runs):
    """Segments of one row from (document, length) pairs."""
    return np.concatenate([np.full(length, document, np.int32) for document, length in runs])


PACKED = np.stack([
    documents((1, 1), (2, 20), (0, 3), (3, 1), (4, 5), (0, 7)),  # gap, length 1, right padding
    documents((0, 37)),  # a row of padding
])
CACHE = np.stack([documents((1, 30), (0, 10)), documents((1, 40))])
DECODE = dict(
    T=3, S=40, q_segments=np.ones((2, 3), np.int32), k_segments=CACHE,
    q_index=np.array([[27, 28, 29], [37, 38, 39]]), k_index=np.tile(np.arange(40), (2, 1)),
)

CASES = {
    "causal": dict(T=32),
    "ragged": dict(T=37),
    "one-token": dict(T=1),
    "shorter-than-block": dict(T=5),
    "wide-values": dict(T=20, K=4, V=7),
    "narrow-values": dict(T=20, K=7, V=2),
    "grouped": dict(T=37, H=6, G=2),
    "one-kv-head": dict(T=37, H=4, G=1),
    "window": dict(T=37, window=9),
    "window-of-one": dict(T=37, window=1),
    "traced-window": dict(T=37, window=jnp.asarray(9)),
    "packed": dict(T=37, q_segments=PACKED, k_segments=PACKED),
    "packed-window": dict(T=37, q_segments=PACKED, k_segments=PACKED, window=4, H=4, G=2),
    "decode": DECODE,
    "decode-window": DECODE | dict(window=5, H=4, G=2),
    "sees-nothing": dict(T=3, S=40, q_index=np.array([[2, 9, 50]] * 2),
                         k_index=np.tile(np.arange(5, 45), (2, 1))),
    "unordered": dict(T=37, q_index=np.tile(np.random.default_rng(0).permutation(37), (2, 1)),
                      k_index=np.tile(np.random.default_rng(1).permutation(37), (2, 1)), window=20),
}


def make(rng, T, S=None, H=2, G=2, K=4, V=4, **options):
    S = S or T
    shapes = (2, T, H, K), (2, S, G, K), (2, S, G, V)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    return arrays, rng.standard_normal((2, T, H, V)), options


def run(arrays, weight, options, implementation, dtype):
    """Outputs and gradients computed in dtype; the options are traced."""
    static = {name: x for name, x in options.items() if isinstance(x, int)}
    traced = {name: x for name, x in options.items() if name not in static}

    @jax.jit
    def gradients(arrays, traced):
        def loss(arrays):
            o = attention(*arrays, **traced, **static, implementation=implementation)
            return (o * weight.astype(dtype)).sum(), o

        return jax.grad(loss, has_aux=True)(arrays)

    (dq, dk, dv), o = gradients([x.astype(dtype) for x in arrays], traced)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def distance(x, y):
    """Root mean square of the difference, relative to y's."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norm = np.sqrt(np.mean(y**2))
    return np.sqrt(np.mean((x - y) ** 2)) / (norm if norm > 1e-20 else 1)


def loops(q, k, v, scale, q_segments=None, k_segments=None, q_index=None, k_index=None,
          window=None):
    """The definition, one row, query and head at a time."""
    B, T, H, _ = q.shape
    S, G, V = v.shape[1:]
    o = np.zeros((B, T, H, V))
    for b, t, h in np.ndindex(B, T, H):
        place = lambda index, i: i if index is None else index[b, i]
        gap = np.array([place(q_index, t) - place(k_index, s) for s in range(S)])
        sees = gap >= 0
        if window is not None:
            sees &= gap < int(window)
        if q_segments is not None:
            sees &= (q_segments[b, t] != 0) & (k_segments[b] == q_segments[b, t])
        if sees.any():
            g = h // (H // G)
            weights = np.exp(scale * k[b, sees, g] @ q[b, t, h])
            o[b, t, h] = weights / weights.sum() @ v[b, sees, g]
    return o


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "_LARGEST_DIRECT", 0)
    monkeypatch.setattr(xla, "_CPU_BLOCKS", (8, 8))


@pytest.fixture
def no_blocks(monkeypatch):
    monkeypatch.setattr(xla, "_LARGEST_DIRECT", 2**40)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case, rng):
    arrays, _, options = make(rng, **CASES[case])
    window = options.pop("window", None)
    reference = jax.jit(functools.partial(
        attention, window=window, scale=0.3, implementation="reference"))
    with jax.enable_x64(True):
        o = reference(*arrays, **options)
    options["window"] = window
    np.testing.assert_allclose(o, loops(*arrays, **options, scale=0.3), rtol=1e-11, atol=1e-13)


FORMS = {
    "small_blocks": ["ragged", "wide-values", "grouped", "traced-window", "packed-window",
                     "decode-window", "sees-nothing", "unordered"],
    "no_blocks": ["one-token", "grouped", "packed-window", "decode"],
}


@pytest.mark.parametrize(
    "case, form",
    [pytest.param(case, form, marks=() if case in default else pytest.mark.slow)
     for form, default in FORMS.items() for case in CASES],
)
def test_xla_is_the_reference(case, form, rng, request):
    request.getfixturevalue(form)
    arrays, weight, options = make(rng, **CASES[case])
    with jax.enable_x64(True):
        expected = run(arrays, weight, options, "reference", np.float64)
    got = run(arrays, weight, options, "xla", np.float32)
    distances = {name: distance(got[name], expected[name]) for name in got}
    assert max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_that_sees_nothing_returns_0_and_has_no_gradient(
        implementation, rng, small_blocks):
    arrays, weight, options = make(rng, **CASES["packed"])
    got = run(arrays, weight, options, implementation, np.float32)
    for name, x in got.items():
        assert not np.any(np.asarray(x)[PACKED == 0]), name
        assert np.any(x) and np.all(np.isfinite(x)), name


@pytest.mark.parametrize("form", ["small_blocks", "no_blocks"])
def test_bfloat16_inputs_cost_a_few_roundings(form, rng, request):
    request.getfixturevalue(form)
    arrays, weight, options = make(rng, T=37, H=4, G=2, K=16, V=16)
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in arrays]
    got = run(arrays, weight, options, "xla", jnp.bfloat16)
    expected = run(arrays, weight, options, "reference", np.float32)
    assert {x.dtype for x in got.values()} == {jnp.dtype(jnp.bfloat16)}
    # Rounded to 8 bits: the softmax weights, the cotangent and the results.
    distances = {name: distance(got[name], expected[name]) for name in got}
    assert max(distances.values()) < 8e-3, distances


def test_keys_in_any_order(rng, small_blocks):
    """A ring buffer holds its keys out of order; only their index counts."""
    arrays, _, _ = make(rng, T=37)
    index = np.tile(np.arange(37), (2, 1))
    order = rng.permutation(37)
    q, k, v = (x.astype(np.float32) for x in arrays)
    o = attention(q, k[:, order], v[:, order], q_index=index, k_index=index[:, order], window=9)
    assert distance(o, attention(q, k, v, window=9)) < 1e-6


@pytest.mark.parametrize(
    "options, untouched",
    [(dict(window=9), slice(0, 16)),
     (dict(q_segments=(s := np.repeat([[1, 2]], 20, 1).astype(np.int32)), k_segments=s),
      slice(0, 16))],
    ids=["window", "segments"],
)
def test_blocks_that_see_nothing_are_not_computed(options, untouched, rng, small_blocks):
    """NaN in a block of keys reaches every query whose block touches it."""
    x = rng.standard_normal((1, 40, 2, 4)).astype(np.float32)
    poisoned = x.copy()
    poisoned[:, untouched] = np.nan
    o = attention(x, x, poisoned, **options)
    assert np.all(np.isfinite(o[:, 32:])) and not np.all(np.isfinite(o[:, :16]))
    dq = jax.grad(lambda q: attention(q, x, poisoned, **options)[:, 32:].sum())(x)
    assert np.all(np.isfinite(dq[:, 32:]))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_shard_map(check_vma, rng, small_blocks):
    arrays, _, _ = make(rng, T=20)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    row = P("data")
    sharded = jax.shard_map(lambda q, v: attention(q, k, v), mesh=mesh, in_specs=row,
                            out_specs=row, check_vma=check_vma)
    gradient = lambda op: jax.jit(jax.grad(lambda q, v: (op(q, v) ** 2).sum(), (0, 1)))(q, v)
    for x, y in zip(gradient(sharded), gradient(lambda q, v: attention(q, k, v))):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_inside_vmap_scan_and_checkpoint(rng, small_blocks):
    arrays, _, _ = make(rng, T=20)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    windows = jnp.array([3, 20])

    def layers(x, implementation):
        def layer(x, window):
            return x + attention(x, k, v, window=window, implementation=implementation), None

        return jax.lax.scan(jax.checkpoint(layer), x, windows)[0]

    gradient = lambda name: jax.jit(jax.grad(lambda x: (layers(x, name) ** 2).sum()))(q)
    np.testing.assert_allclose(gradient("xla"), gradient("reference"), rtol=1e-5, atol=1e-5)

    mapped = jax.vmap(lambda window: attention(q, k, v, window=window))(windows)
    for o, window in zip(mapped, (3, 20)):
        expected = attention(q, k, v, window=window, implementation="reference")
        np.testing.assert_allclose(o, expected, atol=1e-6)
    rows = jax.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(q, k, v)
    np.testing.assert_allclose(rows, attention(q, k, v), atol=1e-6)


def test_memory_is_far_below_all_pairs():
    T = 8192
    x = jax.ShapeDtypeStruct((1, T, 1, 32), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T * 4 / 16
