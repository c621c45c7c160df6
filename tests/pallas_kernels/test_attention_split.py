"""Attention over split rows: each exchange on 2, 4 and 8 devices is the reference on whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention, context, ring, xla

ROW = P(None, "context")


def shards(f, devices, in_specs=ROW, out_specs=ROW, **how):
    axes = (devices,), ("context",), (AxisType.Auto,)
    mesh = jax.make_mesh(*axes, devices=jax.devices()[:devices])
    how = dict(check_vma=False) | how
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **how)


def documents(T):
    """Segments of two rows: documents that cross borders, short ones, a gap; the second row ends
    in padding from the middle on."""
    first = np.repeat([1, 2, 3, 0, 4], [T // 2 + 1, 1, T // 4, 2, T - T // 2 - T // 4 - 4])
    return np.stack([first, np.repeat([1, 0], [T // 2, T - T // 2])]).astype(np.int32)


def make(rng, T, H=2, G=2, K=4, V=4):
    shapes = (2, T, H, K), (2, T, G, K), (2, T, G, V), (2, T, H, V)
    return [rng.standard_normal(shape) for shape in shapes]


def gradients(op, arrays, segments, window):
    """Outputs, dq, dk, dv."""

    def loss(q, k, v, weight):
        o = op(q, k, v, segments, segments, window)
        return (o * weight).sum(), o

    (dq, dk, dv), o = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return dict(o=o, dq=dq, dk=dk, dv=dv)


def whole(q, k, v, q_segments, k_segments, window):
    return attention(
        q, k, v, q_segments=q_segments, k_segments=k_segments, window=window,
        implementation="reference",
    )  # fmt: skip


def split(devices, exchange, **how):
    def op(q, k, v, q_segments, k_segments, window):
        def local(q, k, v, q_segments, k_segments, traced):
            return attention(
                q, k, v, q_segments=q_segments, k_segments=k_segments,
                window=window if isinstance(window, int) else traced,
                context_axis="context", exchange=exchange,
            )  # fmt: skip

        specs = (ROW,) * 5 + (P(),)
        return shards(local, devices, specs, **how)(q, k, v, q_segments, k_segments, window)

    return op


def distances(got, expected):
    """Root mean square of each difference, relative to what is expected unless that is 0."""
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    errors = {name: rms(np.asarray(x, np.float64) - expected[name]) for name, x in got.items()}
    return {name: error / (rms(expected[name]) or 1) for name, error in errors.items()}


def check(
    rng, devices, T, exchange, window=None, packed=False, dtype=np.float32, limit=1e-5, how=(),
    **sizes,
):  # fmt: skip
    arrays = [x.astype(dtype) for x in make(rng, T, **sizes)]
    segments = documents(T) if packed else None
    got = gradients(split(devices, exchange, **dict(how)), arrays, segments, window)
    assert {x.dtype for x in got.values()} == {jnp.dtype(dtype)}
    with jax.enable_x64(True):
        exact = [x.astype(np.float64) for x in arrays]
        found = distances(got, gradients(whole, exact, segments, window))
    assert max(found.values()) < limit, found


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "_LARGEST_DIRECT", 0)
    monkeypatch.setattr(xla, "_CPU_BLOCKS", (8, 8))


CASES = {
    # devices, T, exchange, options
    "ring-2": (2, 32, "ring", {}),
    "ring-4-grouped-packed": (4, 64, "ring", dict(packed=True, H=4, G=2, V=6)),
    "ring-8-odd-shards": (8, 56, "ring", dict(packed=True)),
    "ring-8-one-token-each": (8, 8, "ring", {}),
    "ring-4-traced-window": (4, 64, "ring", dict(window=jnp.asarray(11), packed=True)),
    "gather-2": (2, 32, "gather", {}),
    "gather-8-grouped-packed": (8, 64, "gather", dict(packed=True, H=4, G=1)),
    "gather-4-window": (4, 64, "gather", dict(window=11)),
    "border-8-one-key": (8, 64, "border", dict(window=1)),
    "border-4-within-shard": (4, 64, "border", dict(window=9, packed=True)),
    "border-8-just-a-shard": (8, 64, "border", dict(window=9)),
    "border-8-several-shards": (8, 64, "border", dict(window=20, H=4, G=2)),
    "border-4-beyond-row": (4, 32, "border", dict(window=1000)),
}
DEFAULT = {
    "ring-4-grouped-packed", "ring-8-odd-shards", "gather-8-grouped-packed",
    "border-4-within-shard", "border-8-several-shards",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case if case in DEFAULT else slow(case) for case in CASES]
)
def test_split_is_whole(case, rng, small_blocks):
    devices, T, exchange, options = CASES[case]
    check(rng, devices, T, exchange, **options)


def test_split_is_whole_in_bfloat16(rng, small_blocks):
    # Rounded to 8 bits: the softmax weights and the results, but no partial sum.
    check(rng, 4, 64, "ring", packed=True, dtype=jnp.bfloat16, limit=8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("exchange, window", [("ring", None), ("border", 9), ("gather", 9)])
def test_split_is_whole_where_replication_is_checked(exchange, window, rng, small_blocks):
    check(rng, 2, 32, exchange, window, packed=True, how=dict(check_vma=True))


CHOSEN = {
    "full": (None, "ring"),
    "traced": (np.asarray(3), "ring"),
    "one key": (1, "border"),
    "a shard": (11, "border"),
    "half of the row": (41, "border"),
    "more": (42, "ring"),
}


@pytest.mark.parametrize("window, exchange", CHOSEN.values(), ids=CHOSEN)
def test_choice_of_the_exchange(window, exchange):
    assert context._best(10, 8, window) == exchange


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_every_device_has_the_same_work_in_every_step(devices):
    """Blocks of a half shard each: 3 in the first step, with the diagonal ones, then 2."""
    half = 8

    def work(x):
        index, _ = ring._zigzag_index(2 * half, "context")

        def step(k_index, _):
            k = xla._extents(xla.Places(k_index, None), half)
            blocks = index.reshape(2, 1, half)
            ranges = [xla._seen(xla._extents(xla.Places(q, None), half), k, None) for q in blocks]
            return ring._pass_on(k_index, "context"), sum(end - first for first, end in ranges)

        return jax.lax.scan(step, index, length=devices)[1][None]

    blocks = shards(work, devices, P("context"), P("context"))(np.zeros(devices))
    assert blocks.tolist() == [[3] + [2] * (devices - 1)] * devices


# ---------------------------------------------------------------- a split cache


def cache(rng, T):
    """Queries after 30 and 5 of 40 slots; the second row's keys are all on the first device. A
    last query stands before every key."""
    arrays = [x.astype(np.float32) for x in make(rng, 40, H=4, G=2)[:3]]
    q_index = np.array([[30], [5]]) + np.arange(T)
    q_index[:, -1] = -1 if T > 1 else q_index[:, -1]
    k_index = np.tile(np.arange(40), (2, 1))
    return [arrays[0][:, :T], *arrays[1:], q_index, k_index]


def merged(q, k, v, q_index, k_index, devices=4, **options):
    local = lambda q, k, v, q_index, k_index: attention(
        q, k, v, q_index=q_index, k_index=k_index,
        context_axis="context", exchange="merge", **options,
    )  # fmt: skip
    specs = (P(), ROW, ROW, P(), ROW)
    return jax.jit(shards(local, devices, specs, P()))(q, k, v, q_index, k_index)


@pytest.mark.parametrize("T, window", [(1, None), (3, None), (3, 4)])
def test_queries_of_a_split_cache_see_all_of_it(T, window, rng):
    q, k, v, q_index, k_index = cache(rng, T)
    expected = attention(
        q, k, v, q_index=q_index, k_index=k_index, window=window, implementation="reference"
    )
    o = merged(q, k, v, q_index, k_index, window=window)
    np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-6)
    order = rng.permutation(40)
    o = merged(q, k[:, order], v[:, order], q_index, k_index[:, order], window=window)
    np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-6)


def test_merging_refuses_to_be_differentiated(rng):
    q, *rest = cache(rng, 1)
    with pytest.raises(NotImplementedError, match="for decoding and has no gradient"):
        jax.grad(lambda q: merged(q, *rest).sum())(q)


# ---------------------------------------------------------------- faults

INDEX = dict(q_index=np.arange(4)[None], k_index=np.arange(4)[None])
SPLIT = dict(context_axis="context")
FAULTS = {
    "no axis": (dict(exchange="ring"), ValueError, "'ring' needs a context_axis"),
    "unknown": (SPLIT | dict(exchange="rings"), ValueError, "'rings' is unknown; known are"),
    "indices": (SPLIT | INDEX, ValueError, "exchange='ring' takes no q_index, k_index"),
    "no indices": (SPLIT | dict(exchange="merge"), ValueError, "needs q_index and k_index"),
    "no window": (SPLIT | dict(exchange="border"), ValueError, "needs a window known at compile"),
    "others": (SPLIT | dict(implementation="splash"), NotImplementedError, "only xla serves"),
}


@pytest.mark.parametrize("options, kind, message", FAULTS.values(), ids=FAULTS)
def test_faults(options, kind, message):
    x = np.zeros((1, 4, 1, 2), np.float32)
    with pytest.raises(kind, match=message):
        shards(lambda x: attention(x, x, x, **options), 1, P())(x)
