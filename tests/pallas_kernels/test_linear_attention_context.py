"""Linear attention of rows that are split over devices is that of the whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.context import exclusive_scan
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention.context import _affine_map
from pallas_kernels.linear_attention.decay import alibi_slopes

B, T, H, K, V = 2, 48, 3, 4, 5  # 24, 12 and 6 tokens on each of 2, 4 and 8 devices


def documents(*runs):
    """Segments of rows from (document, length) pairs."""
    return np.stack([np.concatenate([np.full(n, d, np.int32) for d, n in row]) for row in runs])


SEGMENTS = {
    "long": documents([(7, 48)], [(3, 5), (9, 40), (4, 3)]),
    # A border on each device border of 4; the next row has several documents within one part.
    "borders": documents(
        [(1, 12), (2, 12), (3, 24)], [(5, 7), (4, 1), (3, 1), (8, 2), (1, 20), (6, 17)]
    ),
    # Whole parts of padding: first, between two documents, within one, and last.
    "padding": documents(
        [(0, 15), (2, 3), (0, 13), (2, 4), (0, 13)], [(6, 9), (0, 15), (5, 15), (0, 9)]
    ),
    "row of padding": documents([(0, 48)], [(0, 47), (1, 1)]),
}
CASES = {
    "heads": dict(),
    "heads, no states": dict(states=False),
    "heads, long": dict(segments="long"),
    "heads, borders": dict(segments="borders"),
    "heads, padding": dict(segments="padding"),
    "heads, row of padding": dict(segments="row of padding"),
    "tokens": dict(decay="tokens"),
    "tokens, long": dict(decay="tokens", segments="long"),
    "tokens, borders": dict(decay="tokens", segments="borders"),
    "tokens, padding": dict(decay="tokens", segments="padding"),
    "tokens, padding, no states": dict(decay="tokens", segments="padding", states=False),
    "strong tokens": dict(decay="strong tokens", segments="long"),
}
DEFAULT = {
    (2, "heads, padding"), (4, "tokens, borders"), (8, "heads, long"), (8, "tokens, padding"),
    (8, "heads, no states"), (8, "strong tokens"),
}  # fmt: skip


def make(rng, decay="heads", segments=None, states=True):
    normal = lambda *shape: rng.standard_normal(shape)
    decay = {
        "heads": lambda: -alibi_slopes(H),
        "tokens": lambda: -0.2 * np.abs(normal(B, T, H)),
        "strong tokens": lambda: -60 * np.abs(normal(B, T, H)) * (normal(B, T, H) > 1),
    }[decay]()
    arrays = dict(q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, H, V), decay=decay)
    weights = [normal(B, T, H, V)]
    if states:
        arrays["initial_state"] = normal(B, H, K, V)
        weights.append(normal(B, H, K, V))
    return arrays, weights, segments and SEGMENTS[segments]


def gradients(op, arrays, weights, dtype):
    """Outputs and gradients by every array of a function of all outputs."""
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))

    @jax.jit
    def run(arrays, weights):
        def loss(arrays):
            outputs = op(arrays)[: len(weights)]
            return sum((x * w).sum() for x, w in zip(outputs, weights)), outputs

        return jax.grad(loss, has_aux=True)(arrays)

    grads, outputs = run(cast(arrays), cast(weights))
    return dict(zip(("o", "state"), outputs)) | {f"d{name}": x for name, x in grads.items()}


def split_op(devices, arrays, segments, **options):
    """The op on rows split over devices, as a function of whole arrays."""
    mesh = line_of(devices)
    rows = lambda name: P(None, "context") if arrays[name].ndim > 1 else P()
    specs = {name: P() if name == "initial_state" else rows(name) for name in arrays}

    def local(arrays, segments):
        return linear_attention(
            **arrays, segments=segments, output_final_state=True, context_axis="context", **options
        )

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, None if segments is None else P(None, "context")),
        out_specs=(P(None, "context"), P()),
        check_vma=False,
    )
    return jax.jit(lambda arrays: sharded(arrays, segments))


def line_of(devices):
    return jax.make_mesh(
        (devices,), ("context",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )


def distance(x, y):
    """Root mean square of the difference, relative to y's."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norm = np.sqrt(np.mean(y**2))
    return np.sqrt(np.mean((x - y) ** 2)) / (norm if norm > 1e-20 else 1)


@pytest.mark.parametrize(
    "devices, case",
    [
        pytest.param(n, case, marks=() if (n, case) in DEFAULT else pytest.mark.slow)
        for n in (2, 4, 8)
        for case in CASES
    ],
)
def test_split_rows_are_the_whole_rows(devices, case, rng):
    arrays, weights, segments = make(rng, **CASES[case])
    with jax.enable_x64(True):
        whole = lambda arrays: linear_attention(
            **arrays, segments=segments, output_final_state=True, implementation="reference"
        )
        expected = gradients(whole, arrays, weights, np.float64)
    got = gradients(split_op(devices, arrays, segments, chunk_size=4), arrays, weights, np.float32)
    assert got.keys() == expected.keys()
    distances = {name: distance(got[name], expected[name]) for name in got}
    assert max(distances.values()) < 1e-5, distances


def test_bfloat16_rows_cost_only_their_rounding(rng):
    arrays, _, segments = make(rng, segments="long")
    arrays = {name: jnp.asarray(x, jnp.bfloat16 if name in "qkv" else jnp.float32)
              for name, x in arrays.items()}  # fmt: skip
    o, state = split_op(4, arrays, segments)(arrays)
    whole, final = split_op(1, arrays, segments)(arrays)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert distance(o, whole) < 1e-3  # a few differ by their last bit
    assert distance(state, final) < 1e-6


def test_a_long_part_forgets_exactly():
    """The last tokens' weights in a part whose decays sum to -1e6, of which f32 knows 0.06."""
    T = 2**17
    decay = np.where(np.arange(T) < T - 64, -8.0, -0.03)[None, :, None]
    ones = np.ones((1, T, 1, 1))
    exact = np.exp(-0.03 * np.arange(65)).sum()
    part = _affine_map(*(jnp.asarray(x, jnp.float32) for x in (ones, ones, decay)), None)
    assert abs(part.update.item() / exact - 1) < 1e-5
    assert part.keep.item() == 0


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("devices", (1, 2, 3, 8))
def test_the_scan_composes_in_order(devices, check_vma, rng):
    """With maps S -> A S + U, whose order matters (the gated delta rule's)."""
    A, U = rng.standard_normal((2, devices, 3, 3))
    expected = [np.zeros((3, 3))]
    for a, u in zip(A, U):
        expected.append(a @ expected[-1] + u)

    def combine(earlier, later):
        return {"A": later["A"] @ earlier["A"], "U": later["A"] @ earlier["U"] + later["U"]}

    def local(A, U):
        identity = {"A": jnp.eye(3)[None], "U": jnp.zeros((1, 3, 3))}
        return exclusive_scan({"A": A, "U": U}, combine, identity, "context")["U"]

    spec = P("context")
    scan = jax.shard_map(
        local, mesh=line_of(devices), in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    got = jax.jit(scan)(*map(jnp.float32, (A, U)))
    np.testing.assert_allclose(got, expected[:-1], rtol=1e-4, atol=1e-4)
