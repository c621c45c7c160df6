import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule.shapes import SHAPES
from pallas_kernels.gated_delta_rule.triangular import unit_lower_inverse

op = jax.jit(gated_delta_rule, static_argnames=(
    "scale", "output_final_state", "l2_norm", "chunk_size", "implementation"))
with_state = functools.partial(op, output_final_state=True)


def small(rng, T=21, B=2, heads=(1, 1, 2), K=5, V=3, dtype=np.float32):
    """Arrays of a cheap call, with decays from weak to strong."""
    Hq, Hk, H = heads
    normal = lambda *shape: rng.standard_normal(shape)
    arrays = dict(
        q=normal(B, T, Hq, K),
        k=normal(B, T, Hk, K) / K**0.5,
        v=normal(B, T, H, V),
        beta=rng.uniform(0, 1, (B, T, H)),
        decay=-np.exp(normal(B, T, H)),
        initial_state=normal(B, H, K, V),
    )
    return {name: x.astype(dtype) for name, x in arrays.items()}


def loops(q, k, v, beta, decay, initial_state, segments, scale):
    """The definition, one row, token and head at a time."""
    B, T, H, V = v.shape
    Hq, Hk, Ho = q.shape[2], k.shape[2], max(q.shape[2], H)
    o, final = np.zeros((B, T, Ho, V)), initial_state.copy()
    for b, h in np.ndindex(B, H):
        state, document = initial_state[b, h].copy(), None
        readers = range(h * Ho // H, (h + 1) * Ho // H)
        for t in np.flatnonzero(segments[b]):
            if document not in (None, segments[b, t]):
                state[:] = 0
            document, key = segments[b, t], k[b, t, h * Hk // H]
            state *= np.exp(decay[b, t, h])
            state += np.outer(key, beta[b, t, h] * (v[b, t, h] - key @ state))
            for reader in readers:
                o[b, t, reader] = scale * q[b, t, reader * Hq // Ho] @ state
        final[b, h] = state
    return o, final


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("heads", [(2, 2, 2), (1, 1, 3), (4, 2, 2), (1, 2, 2)], ids=str)
def test_reference_is_the_definition(heads, rng):
    arrays, segments = small(rng, heads=heads, dtype=np.float64), cases.packed(21)
    with jax.enable_x64(True):
        got = with_state(**arrays, segments=segments, scale=0.3, implementation="reference")
    for x, y in zip(got, loops(**arrays, segments=segments, scale=0.3)):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("l2_norm", [False, True], ids=["plain", "l2-norm"])
def test_gradients_of_the_reference_are_finite_differences(l2_norm, rng):
    arrays, segments = small(rng, T=13, heads=(2, 1, 2), dtype=np.float64), cases.packed(13)
    weights = rng.standard_normal((2, 13, 2, 3)), rng.standard_normal((2, 2, 5, 3))

    @jax.jit
    def loss(arrays):
        out = gated_delta_rule(**arrays, segments=segments, l2_norm=l2_norm,
                               output_final_state=True, implementation="reference")
        return sum((x * w).sum() for x, w in zip(out, weights))

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))(arrays)
        for name, x in arrays.items():
            direction, step = rng.standard_normal(x.shape), 1e-6
            ends = [loss(arrays | {name: x + s * direction}) for s in (step, -step)]
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose((gradient[name] * direction).sum(), slope, rtol=1e-6)


# ---------------------------------------------------------------- implementations


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i % 3 == 1 else pytest.mark.slow)
     for i, case in enumerate(cases.PAIRWISE)],
)
def test_xla_is_the_oracle(case):
    cases.assert_close(cases.run(case, "xla"), cases.oracle(case), case.dtype)


def shape_of(case):
    return case.T, case.widths, case.heads


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shape", sorted(set(map(shape_of, cases.ALL))), ids=str)
def test_every_case(implementation, shape):
    for case in cases.ALL:
        if shape_of(case) == shape:
            actual, expected = cases.run(case, implementation), cases.oracle(case)
            cases.assert_close(actual, expected, case.dtype)
    jax.clear_caches()  # of all shapes they are more programs than a process can map


@pytest.mark.parametrize("chunk_size", [20, 128])
def test_any_chunk_size_gives_the_same(chunk_size, rng):
    arrays, segments = small(rng, T=100), cases.packed(100)
    call = functools.partial(with_state, **arrays, segments=segments)
    for x, y in zip(call(chunk_size=chunk_size), call(implementation="reference")):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(16,), (1, 2, 5), (20,)], ids=str)
def test_pieces_are_the_whole(cuts, rng):
    """One token, few tokens and many, in chunks or not."""
    arrays = small(rng)
    state, pieces = arrays.pop("initial_state"), []
    whole = with_state(**arrays, initial_state=state)
    for start, stop in itertools.pairwise((0, *cuts, 21)):
        part = {name: x[:, start:stop] for name, x in arrays.items()}
        o, state = with_state(**part, initial_state=state)
        pieces.append(o)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(state, whole[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("T", [8, 21])
def test_documents_are_as_alone(T, rng):
    arrays, segments = small(rng, T=T), cases.packed(T)
    del arrays["initial_state"]
    o, _ = op(**arrays, segments=segments)
    for row, document in [(0, 1), (0, 2), (1, 7)]:
        at = segments[row] == document
        alone, _ = op(**{name: x[row][None, at] for name, x in arrays.items()})
        np.testing.assert_allclose(o[row, at], alone[0], atol=2e-6)
    assert not np.any(o[segments == 0])


def test_right_padding_changes_no_output_and_no_state(rng):
    arrays = small(rng)
    segments = np.repeat([[1, 0]], 2, axis=0).repeat([13, 8], axis=1)
    o, state = with_state(**arrays, segments=segments)
    short = {name: x if name == "initial_state" else x[:, :13] for name, x in arrays.items()}
    o_short, state_short = with_state(**short)
    np.testing.assert_allclose(o[:, :13], o_short, atol=1e-6)
    np.testing.assert_allclose(state, state_short, atol=1e-6)


@pytest.mark.parametrize("T", [2, 21])
def test_a_row_of_padding_changes_no_state(T, rng):
    arrays = small(rng, T=T)
    o, state = with_state(**arrays, segments=np.zeros((2, T), np.int32))
    np.testing.assert_array_equal(state, arrays["initial_state"])
    assert not np.any(o)


def test_defaults(rng):
    """No state is one of zeros; the final state is given on request; the scale is K^-1/2."""
    arrays = small(rng)
    zeros = np.zeros_like(arrays.pop("initial_state"))
    o, state = op(**arrays)
    assert state is None
    same = with_state(**arrays, initial_state=zeros, scale=5**-0.5)
    np.testing.assert_allclose(o, same[0], atol=1e-6)
    assert op(**arrays, implementation="reference")[1] is None


@pytest.mark.parametrize("T", [2, 21])
def test_without_decay_it_is_that_of_zero(T, rng):
    arrays = small(rng, T=T)
    decay = np.zeros_like(arrays.pop("decay"))
    np.testing.assert_allclose(op(**arrays)[0], op(**arrays, decay=decay)[0], atol=1e-6)


def test_l2_norm_is_that_of_normalised_arrays(rng):
    arrays = small(rng, T=12)
    unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    normed = arrays | dict(q=unit(arrays["q"]), k=unit(arrays["k"]))
    np.testing.assert_allclose(op(**arrays, l2_norm=True)[0], op(**normed)[0], atol=1e-6)
    zero = arrays | dict(q=np.zeros_like(arrays["q"]), k=np.zeros_like(arrays["k"]))
    loss = lambda q: op(**zero | dict(q=q), l2_norm=True)[0].sum()
    assert np.isfinite(jax.grad(loss)(zero["q"])).all()


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_repeat_cost_no_precision(beta, rng):
    """All keys of a chunk are one: the powers of the system's matrix are largest."""
    arrays = small(rng, T=256, B=1, heads=(1, 1, 1))
    del arrays["decay"]
    arrays["k"][:] = np.eye(5)[0]
    arrays["beta"][:] = beta
    o, _ = op(**arrays)
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        expected, _ = op(**wide, implementation="reference")
    np.testing.assert_allclose(o, expected, rtol=1e-4, atol=1e-4 if beta == 2 else 1e-6)


@pytest.mark.parametrize("C", [1, 2, 16, 64, 128])
def test_inverse_of_unit_lower_triangular_matrices(C, rng):
    a = np.tril(rng.uniform(-1, 1, (3, C, C)), -1).astype(np.float32) / C**0.5
    product = (np.eye(C) + a) @ np.asarray(unit_lower_inverse(a), np.float64)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(C), a.shape), atol=2e-6)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_shard_map_vmap_and_checkpoint(check_vma, rng):
    arrays = small(rng)
    del arrays["initial_state"]
    chunked = jax.checkpoint(lambda *arrays: gated_delta_rule(*arrays, chunk_size=8)[0])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(chunked, mesh=mesh, in_specs=P("data"), out_specs=P("data"),
                            check_vma=check_vma)
    gradient = lambda f: jax.jit(jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2, 3, 4)))
    arrays = [jnp.asarray(arrays[name]) for name in ("q", "k", "v", "beta", "decay")]
    expected = gradient(chunked)(*arrays)
    for x, y in zip(gradient(sharded)(*arrays), expected):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)
    rows = jax.vmap(lambda *x: chunked(*[x[None] for x in x])[0])
    for x, y in zip(gradient(rows)(*arrays), expected):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_memory_grows_with_length_not_its_square():
    def peak(T):
        x, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, T, 1, 32), (1, T, 1)])
        loss = lambda q, k, v, beta, decay: gated_delta_rule(q, k, v, beta, decay)[0].sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(x, x, x, row, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    slope = (peak(65536) - peak(32768)) / 32768
    assert slope < 20 * 4 * 32  # bytes per token: q, k, v, o and their gradients are 8 rows
    assert peak(65536) < 2.5 * peak(32768)


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_have_the_types_of_published_shapes(name):
    shape, arrays = SHAPES[name], SHAPES[name].arrays(B=2, T=4096)
    o, state = jax.eval_shape(with_state, **arrays)
    assert (o.shape, o.dtype) == (arrays["v"].shape, jnp.bfloat16)
    assert (state.shape, state.dtype) == ((2, shape.value_heads, shape.K, shape.V), jnp.float32)
    loss = lambda arrays: gated_delta_rule(**arrays)[0].astype(jnp.float32).sum()
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(jax.eval_shape(jax.grad(loss), arrays)) == types(arrays)


# ---------------------------------------------------------------- faults


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


VALID = dict(q=ones(2, 5, 2, 4), k=ones(2, 5, 2, 4), v=ones(2, 5, 4, 6), beta=ones(2, 5, 4),
             decay=-ones(2, 5, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=ones(2, 5, 4)), r"q must have rank 4.*\[2, 5, 4\]"),
        (dict(v=ones(2, 5, 4)), "v must have rank 4"),
        (dict(k=ones(2, 6, 2, 4)), r"k must be \[2, 5, 2, 4\].*\[2, 6, 2, 4\]"),
        (dict(k=ones(2, 5, 2, 3)), r"k must be \[2, 5, 2, 4\]"),
        (dict(k=ones(2, 5, 3, 4)), "k's heads must divide v's, got 3 and 4"),
        (dict(k=ones(2, 5, 8, 4)), "k's heads must divide v's, got 8 and 4"),
        (dict(q=ones(2, 5, 3, 4)), "q's heads must divide v's or be a multiple.*got 3 and 4"),
        (dict(v=ones(2, 4, 4, 6)), r"v must be \[2, 5, 4, 6\]"),
        (dict(beta=ones(2, 5)), r"beta must be \[2, 5, 4\]"),
        (dict(beta=3 * ones(2, 5, 4)), r"beta must be in \[0, 2\].*3"),
        (dict(beta=-ones(2, 5, 4)), r"beta must be in \[0, 2\].*-1"),
        (dict(beta=np.nan * ones(2, 5, 4)), r"beta must be in \[0, 2\].*nan"),
        (dict(decay=-ones(2, 5, 2)), r"decay must be \[2, 5, 4\]"),
        (dict(decay=ones(2, 5, 4)), "decay is a log decay and must be <= 0.*1.0"),
        (dict(decay=-np.inf * ones(2, 5, 4)), "must be finite.*-inf"),
        (dict(initial_state=ones(2, 4, 6, 4)), r"initial_state must be \[2, 4, 4, 6\]"),
        (dict(segments=ones(2, 4, dtype=np.int32)), r"segments must be \[2, 5\]"),
        (dict(segments=ones(2, 5)), "segments must be integers, got float32"),
        (dict(v=ones(2, 5, 4, 6, dtype=np.int32)), "v must be floating point, got int32"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(implementation="best"), "'best' is unknown; known are reference, xla, tpu"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_faults_name_the_argument_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**VALID | change)
