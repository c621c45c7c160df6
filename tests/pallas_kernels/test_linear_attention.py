import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_attention import linear_attention, xla
from pallas_kernels.linear_attention.decay import alibi_slopes

H = 3


def documents(*runs):
    """Segments of one row from (document, length) pairs."""
    return np.concatenate([np.full(length, document, np.int32) for document, length in runs])


PACKED = np.stack([
    documents((1, 1), (2, 20), (0, 3), (3, 1), (4, 5), (0, 5)),  # gap, length 1, right padding
    documents((0, 9), (7, 26)),  # a row that begins with a chunk of padding
])
PADDED = np.stack([documents((0, 35)), documents((5, 35))])  # a row of padding

CASES = {
    "heads": dict(T=32),
    "ragged": dict(T=29),
    "one-token": dict(T=1),
    "shorter-than-chunk": dict(T=5),
    "one-chunk": dict(T=8),
    "wide-values": dict(T=20, K=4, V=7),
    "narrow-values": dict(T=20, K=7, V=2),
    "traced-heads": dict(T=29, decay="traced"),
    "token-decay": dict(T=29, decay="token"),
    "strong-heads": dict(T=29, decay="strong-heads"),
    "strong-token": dict(T=29, decay="strong-token"),
    "packed": dict(T=35, segments=PACKED),
    "packed-token-decay": dict(T=35, segments=PACKED, decay="token"),
    "packed-strong": dict(T=35, segments=PACKED, decay="strong-token"),
    "row-of-padding": dict(T=35, segments=PADDED, decay="traced"),
    "default-chunk": dict(T=100, chunk_size=None),
}


def make(rng, T, K=4, V=4, decay="heads", segments=None, chunk_size=8):
    normal = lambda *shape: rng.standard_normal(shape)
    decay = {
        "heads": lambda: -alibi_slopes(H),
        "traced": lambda: -alibi_slopes(H),
        "token": lambda: -np.abs(normal(2, T, H)),
        "strong-heads": lambda: np.array([-25.0, -90.0, -0.1]),
        "strong-token": lambda: -60 * np.abs(normal(2, T, H)),
    }[decay]()
    arrays = dict(q=normal(2, T, H, K), k=normal(2, T, H, K), v=normal(2, T, H, V),
                  initial_state=normal(2, H, K, V), decay=decay)
    weights = normal(2, T, H, V), normal(2, H, K, V)
    return arrays, weights, dict(segments=segments, chunk_size=chunk_size)


def run(arrays, weights, options, implementation, dtype, static_decay=False):
    """Outputs and gradients by every array, computed in dtype."""
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    decay = arrays.pop("decay") if static_decay else None

    @jax.jit
    def value_and_grad(arrays, weights):
        def loss(arrays):
            out = linear_attention(**({"decay": decay} | arrays), **options,
                                   output_final_state=True, implementation=implementation)
            return sum((x * w).sum() for x, w in zip(out, weights)), out

        return jax.grad(loss, has_aux=True)(arrays)

    gradients, (o, state) = value_and_grad(arrays, [w.astype(dtype) for w in weights])
    return {"o": o, "state": state} | {f"d{name}": x for name, x in gradients.items()}


def distance(x, y):
    """Root mean square of the difference, relative to y's."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norm = np.sqrt(np.mean(y**2))
    return np.sqrt(np.mean((x - y) ** 2)) / (norm if norm > 1e-20 else 1)


def loops(q, k, v, decay, initial_state, segments, scale):
    """The definition, one row, token and head at a time."""
    B, T, H, K = q.shape
    decay = np.broadcast_to(decay, (B, T, H))
    o, final = np.zeros_like(v), initial_state.copy()
    for b, h in np.ndindex(B, H):
        state, document = initial_state[b, h].copy(), None
        for t in range(T):
            segment = 1 if segments is None else segments[b, t]
            if segment == 0:
                continue
            if document not in (None, segment):
                state[:] = 0
            document = segment
            state = np.exp(decay[b, t, h]) * state + np.outer(k[b, t, h], v[b, t, h])
            o[b, t, h] = scale * q[b, t, h] @ state
        final[b, h] = state
    return o, final


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case, rng):
    arrays, _, options = make(rng, **CASES[case])
    with jax.enable_x64(True):
        o, state = linear_attention(**arrays, **options, scale=0.3, output_final_state=True,
                                    implementation="reference")
    o_loops, state_loops = loops(**arrays, segments=options["segments"], scale=0.3)
    np.testing.assert_allclose(o, o_loops, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(state, state_loops, rtol=1e-11, atol=1e-12)


DEFAULT = ("ragged", "one-token", "wide-values", "traced-heads", "strong-token", "packed",
           "packed-token-decay", "row-of-padding")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CASES],
)
def test_xla_is_the_reference(case, rng):
    arrays, weights, options = make(rng, **CASES[case])
    static = CASES[case].get("decay", "heads") == "heads"
    with jax.enable_x64(True):
        expected = run(arrays, weights, options, "reference", np.float64, static)
    got = run(arrays, weights, options, "xla", np.float32, static)
    assert got.keys() == expected.keys() and ("ddecay" in got) != static
    distances = {name: distance(got[name], expected[name]) for name in got}
    assert max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("case", ["packed-strong", "traced-heads"])
def test_several_spans_in_float64(case, rng, monkeypatch):
    monkeypatch.setattr(xla, "_SPAN", 2)
    arrays, weights, options = make(rng, **CASES[case])
    with jax.enable_x64(True):
        expected = run(arrays, weights, options, "reference", np.float64)
        got = run(arrays, weights, options, "xla", np.float64)
    distances = {name: distance(got[name], expected[name]) for name in got}
    assert max(distances.values()) < 1e-13, distances


@pytest.mark.parametrize("case", ["heads", "packed-token-decay"])
def test_bfloat16_inputs_cost_only_their_rounding(case, rng):
    arrays, _, options = make(rng, **CASES[case])
    arrays |= {name: np.asarray(jnp.asarray(arrays[name], jnp.bfloat16)) for name in "qkv"}
    o, state = linear_attention(**arrays, **options, output_final_state=True)
    wide = {name: x.astype(np.float32) for name, x in arrays.items()}
    o_wide, state_wide = linear_attention(**wide, **options, output_final_state=True)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert distance(o, o_wide) < 3e-3  # one rounding to 8 bits
    assert distance(state, state_wide) < 1e-6


@pytest.mark.parametrize("cut, decay", [(8, "heads"), (13, "token")])
def test_split_in_two_is_the_whole(cut, decay, rng):
    arrays, _, options = make(rng, T=29, decay=decay)
    state = arrays.pop("initial_state")
    rows = [name for name, x in arrays.items() if x.ndim > 1]
    first = arrays | {name: arrays[name][:, :cut] for name in rows}
    second = arrays | {name: arrays[name][:, cut:] for name in rows}
    call = lambda arrays, state: linear_attention(
        **arrays, **options, initial_state=state, output_final_state=True)
    o_first, middle = call(first, state)
    o_second, end = call(second, middle)
    o, final = call(arrays, state)
    assert distance(np.concatenate([o_first, o_second], 1), o) < 1e-6
    assert distance(end, final) < 1e-6


def test_documents_are_as_alone(rng):
    arrays, _, options = make(rng, T=35, segments=PACKED)
    del arrays["initial_state"]
    o, _ = linear_attention(**arrays, **options)
    for row, document in [(0, 1), (0, 4), (1, 7)]:
        at = PACKED[row] == document
        alone = {name: x[row][None, at] for name, x in arrays.items() if name != "decay"}
        o_alone, _ = linear_attention(**alone, decay=arrays["decay"])
        np.testing.assert_allclose(o[row, at], o_alone[0], atol=2e-5)
    assert not np.any(o[PACKED == 0])


def test_right_padding_changes_no_output_and_no_state(rng):
    arrays, _, options = make(rng, T=35, decay="token")
    segments = np.stack([documents((1, 13), (0, 22))] * 2)
    o, state = linear_attention(**arrays, segments=segments, chunk_size=8, output_final_state=True)
    short = {name: x if name == "initial_state" else x[:, :13] for name, x in arrays.items()}
    o_short, state_short = linear_attention(**short, chunk_size=8, output_final_state=True)
    assert distance(o[:, :13], o_short) < 1e-6
    assert distance(state, state_short) < 1e-6


def test_the_final_state_is_given_only_on_request(rng):
    arrays, _, _ = make(rng, T=5)
    assert linear_attention(**arrays)[1] is None
    assert linear_attention(**arrays, implementation="reference")[1] is None


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_shard_map_vmap_and_checkpoint(check_vma, rng, monkeypatch):
    monkeypatch.setattr(xla, "_SPAN", 2)
    arrays, _, _ = make(rng, T=16)
    q, k, v, decay = (jnp.asarray(arrays[name], jnp.float32) for name in ("q", "k", "v", "decay"))
    state = jnp.ones((1, H, 4, 4))
    op = jax.checkpoint(lambda q, k, v: linear_attention(
        q, k, v, decay, initial_state=state, chunk_size=4)[0])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(op, mesh=mesh, in_specs=P("data"), out_specs=P("data"),
                            check_vma=check_vma)
    row = lambda *x: [x[:1] for x in x]
    gradient = lambda op: jax.jit(jax.grad(lambda *x: (op(*x) ** 2).sum(), (0, 1, 2)))
    for x, y in zip(gradient(sharded)(*row(q, k, v)), gradient(op)(*row(q, k, v))):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)
    mapped = jax.vmap(lambda *x: op(*[x[None] for x in x])[0])(q, k, v)
    np.testing.assert_allclose(mapped[:1], op(*row(q, k, v)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", ["heads", "token"])
def test_memory_per_token_is_a_few_rows(decay):
    def peak(T):
        x, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, T, 1, 32), (1, T, 1)])
        arrays = (x, x, x, row) if decay == "token" else (x, x, x)
        fixed = () if decay == "token" else (np.array([-0.01]),)
        loss = lambda *arrays: linear_attention(*arrays, *fixed)[0].sum()
        compiled = jax.jit(jax.grad(loss, range(len(arrays)))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    per_token = (peak(65536) - peak(32768)) / 32768
    assert per_token < 5 * 4 * 32  # twice as much with every chunk's state and matrices


@pytest.mark.parametrize(
    "heads, slopes",
    [(1, [2**-8]), (4, [2**-2, 2**-4, 2**-6, 2**-8]), (3, [2**-4, 2**-8, 2**-2]),
     (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])],
)
def test_alibi_slopes(heads, slopes):
    np.testing.assert_allclose(alibi_slopes(heads), slopes)


def test_alibi_decays_of_32_heads():
    decays = np.exp(-alibi_slopes(32))
    np.testing.assert_allclose(
        decays[[0, 1, 2, 3, 31]], [0.4313237, 0.4930687, 0.5517813, 0.6065307, 0.9961014],
        rtol=1e-6)
