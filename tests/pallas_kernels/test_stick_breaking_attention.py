import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.stick_breaking_attention import stick_breaking_attention, xla

DOCUMENTS = np.array([[1] * 9 + [2] * 3 + [0] * 2 + [3] * 7, [1] + [2] * 19 + [0]])
CASES = {
    "whole": dict(),
    "packed": dict(segments=DOCUMENTS),
    "grouped": dict(H=4, G=2, segments=DOCUMENTS),
    "large-logits": dict(scale=30.0),
    "one-token": dict(T=1),
    "pieces": dict(T=3, S=21),  # of a cache, some of whose slots are still empty
    "one-query": dict(T=1, S=21),
}


def make(rng, T=21, S=None, H=2, G=1, K=5, V=3, segments=None, **options):
    """Arrays, and keyword arguments."""
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    arrays = dict(q=normal(2, T, H, K), k=normal(2, S or T, G, K), v=normal(2, S or T, G, V))
    if segments is not None:
        options |= dict(q_segments=segments, k_segments=segments)
    if S is not None:
        index = np.array([[4], [12]]) + np.arange(T)
        options |= dict(q_index=index, k_index=np.tile(np.arange(S), (2, 1)))
    return arrays, options, normal(2, T, H, V)


def loops(q, k, v, scale=None, q_segments=None, k_segments=None, q_index=None, k_index=None):
    """The definition, one query and head at a time: the stick, and what each key breaks off."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    o = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in np.ndindex(B, T, H):
        stick, g = 1.0, h // (H // G)
        for s in reversed(range(S)):
            at = (t, s) if q_index is None else (q_index[b, t], k_index[b, s])
            same = q_segments is None or 0 != q_segments[b, t] == k_segments[b, s]
            if at[1] < at[0] and same:
                logit = q[b, t, h] @ k[b, s, g] * (K**-0.5 if scale is None else scale)
                taken = stick / (1 + np.exp(-logit))
                o[b, t, h] += taken * v[b, s, g]
                stick -= taken
    return o


@functools.partial(jax.jit, static_argnames=("implementation", "scale"))
def run(arrays, do, implementation, scale=None, **options):
    """Outputs and the gradient by each array."""

    def loss(arrays):
        o = stick_breaking_attention(
            **arrays, **options, scale=scale, implementation=implementation
        )
        return (o * do).sum(), o

    gradients, o = jax.grad(loss, has_aux=True)(arrays)
    return dict(o=o) | gradients


def wide(arrays):
    return {name: x.astype(np.float64) for name, x in arrays.items()}


SLOW = ("whole", "packed", "one-token", "one-query")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES]
)
def test_xla_is_the_definition(case, rng, monkeypatch):
    """Outputs by the loops; gradients by those of the reference, which is the loops too."""
    monkeypatch.setattr(xla, "_CPU_BLOCK", 8)
    arrays, options, do = make(rng, **CASES[case])
    with jax.enable_x64(True):
        expected = run(wide(arrays), do, "reference", **options)
        np.testing.assert_allclose(expected["o"], loops(**wide(arrays), **options), atol=1e-12)
    got = run(arrays, do, "xla", **options)
    for name, x in expected.items():
        size = np.sqrt(np.mean(np.square(x))) + 1e-3
        np.testing.assert_allclose(got[name], x, atol=3e-5 * size, rtol=1e-4, err_msg=name)


def test_gradients_of_the_reference_are_finite_differences(rng):
    arrays, options, do = make(rng, **CASES["packed"])
    step = {name: 1e-6 * rng.standard_normal(x.shape) for name, x in arrays.items()}
    at = lambda sign: {name: x + sign * step[name] for name, x in wide(arrays).items()}
    difference = ((loops(**at(1), **options) - loops(**at(-1), **options)) * do).sum()
    with jax.enable_x64(True):
        gradient = run(wide(arrays), do, "reference", **options)
    slope = sum((np.asarray(gradient[name]) * x).sum() for name, x in step.items())
    np.testing.assert_allclose(2 * slope, difference, rtol=1e-6)


def test_a_cache_split_over_devices_is_a_whole_one(rng):
    arrays, options, _ = make(rng, T=3, S=24)
    expected = stick_breaking_attention(**arrays, **options)
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Explicit,))
    whole, split = P(), P(None, "x")

    def part(q, k, v, q_index, k_index):
        return stick_breaking_attention(
            q, k, v, q_index=q_index, k_index=k_index, context_axis="x", exchange="merge"
        )

    specs = (whole, split, split, whole, split)
    with jax.set_mesh(mesh):
        call = jax.jit(jax.shard_map(part, in_specs=specs, out_specs=whole, check_vma=False))
        places = options["q_index"], options["k_index"]
        inputs = zip((*arrays.values(), *places), specs)
        got = call(*(jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in inputs))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.slow
def test_memory_does_not_hold_all_pairs():
    @functools.cache
    def peak(T):
        array = lambda heads: jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32)
        loss = lambda q, k, v: stick_breaking_attention(q, k, v).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array(4), array(1), array(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(16384) < 2.2 * peak(8192)


ones = lambda *shape: np.ones(shape, np.float32)
VALID = dict(q=ones(2, 5, 4, 3), k=ones(2, 5, 2, 3), v=ones(2, 5, 2, 6))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=ones(2, 5, 4)), "must have rank 4"),
        (dict(k=ones(2, 5, 2, 4)), r"k must be \[2, 5, 2, 3\]"),
        (dict(q=ones(2, 5, 3, 3)), "got 3 and 2"),
        (dict(q=ones(2, 4, 4, 3)), r"given where T \(4\) differs from S \(5\)"),
        (dict(q_segments=np.ones((2, 5), int)), "must be given together"),
        (dict(exchange="merge"), "exchange is 'merge': use None, or with a context_axis"),
        (dict(implementation="best"), "'best' is unknown"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_faults_name_the_argument_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        stick_breaking_attention(**VALID | change)
