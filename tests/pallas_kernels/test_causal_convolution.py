import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_convolution import causal_convolution

op = jax.jit(causal_convolution, static_argnames=("output_final_state", "implementation"))
with_state = functools.partial(op, output_final_state=True)

D = 5
PACKED = np.array([  # gap, lengths 1 to 5, padding at both ends; a row of padding
    [1, 2, 2, 2, 2, 2, 0, 0, 3, 4, 4, 0],
    [0, 0, 0, 0, 0, 7, 7, 8, 8, 8, 0, 0],
    [0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0] * 12,
], np.int32)
CASES = {
    "whole": dict(),
    "packed": dict(segments=PACKED),
    "packed-wide": dict(segments=PACKED, W=6),
    "one-token": dict(T=1),
    "one-token-padded": dict(T=1, segments=np.array([[1], [0], [1], [0]], np.int32)),
    "shorter-than-the-kernel": dict(T=2),
    "one-column": dict(W=1, segments=PACKED),
}


def make(rng, T=12, W=4, segments=None, dtype=np.float64):
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    B = 4
    arrays = dict(x=normal(B, T, D), kernel=normal(D, W), initial_state=normal(B, W - 1, D))
    return arrays, segments


def loops(x, kernel, initial_state, segments):
    """The definition: each document with the inputs before it."""
    (B, T, _), W = x.shape, kernel.shape[1]
    segments = np.ones((B, T), int) if segments is None else segments
    y, state = np.zeros_like(x), initial_state.copy()
    for b in range(B):
        for document in dict.fromkeys(segments[b][segments[b] != 0]):
            at = np.flatnonzero(segments[b] == document)
            first = not np.any(segments[b, : at[0]])
            past = initial_state[b] if first else np.zeros_like(initial_state[b])
            inputs = np.concatenate([past, x[b, at]])
            for i, t in enumerate(at):
                y[b, t] = (inputs[i : i + W].T * kernel).sum(1)
            state[b] = inputs[len(at) :]
    return y, state


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_definition(case, implementation, rng):
    arrays, segments = make(rng, **CASES[case])
    with jax.enable_x64(True):
        got = with_state(**arrays, segments=segments, implementation=implementation)
    for x, y in zip(got, loops(**arrays, segments=segments)):
        np.testing.assert_allclose(x, y, atol=1e-12)


@functools.partial(jax.jit, static_argnums=3)
def gradients(arrays, segments, weights, implementation):
    def loss(arrays):
        out = causal_convolution(**arrays, segments=segments, output_final_state=True,
                                 implementation=implementation)
        return sum((x * w).sum() for x, w in zip(out, weights))

    return jax.grad(loss)(arrays)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", ["whole", "packed"])
def test_gradients_are_finite_differences(case, implementation, rng):
    """The function is bilinear: a difference of any size is exact."""
    arrays, segments = make(rng, **CASES[case])
    weights = [rng.standard_normal(x.shape) for x in (arrays["x"], arrays["initial_state"])]
    value = lambda arrays: sum(
        (x * w).sum() for x, w in zip(loops(**arrays, segments=segments), weights))
    with jax.enable_x64(True):
        gradient = gradients(arrays, segments, weights, implementation)
    for name, x in arrays.items():
        direction = rng.standard_normal(x.shape)
        slope = value(arrays | {name: x + direction}) - value(arrays)
        actual = (np.asarray(gradient[name]) * direction).sum()
        np.testing.assert_allclose(actual, slope, rtol=1e-9)


@pytest.mark.parametrize("cuts", [range(1, 12), (2, 3, 9)], ids=["one-by-one", "uneven"])
def test_pieces_are_the_whole(cuts, rng):
    arrays, _ = make(rng, dtype=np.float32)
    x, kernel, state = arrays.values()
    whole, final = with_state(x, kernel, initial_state=state)
    pieces = []
    for start, stop in itertools.pairwise((0, *cuts, 12)):
        y, state = with_state(x[:, start:stop], kernel, initial_state=state)
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-6)
    np.testing.assert_array_equal(state, final)


def test_bfloat16_costs_one_rounding(rng):
    arrays, segments = make(rng, **CASES["packed"])
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    y, state = with_state(**arrays, segments=segments)
    assert y.dtype == state.dtype == jnp.bfloat16
    wide = {name: x.astype(np.float32) for name, x in arrays.items()}
    expected, expected_state = with_state(**wide, segments=segments)
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(state.astype(np.float32), expected_state)


def test_defaults(rng):
    arrays, segments = make(rng, **CASES["packed"])
    zeros = np.zeros_like(arrays.pop("initial_state"))
    y, state = op(**arrays, segments=segments)
    assert state is None
    np.testing.assert_array_equal(y, op(**arrays, segments=segments, initial_state=zeros)[0])


VALID = dict(x=np.ones((2, 5, 3)), kernel=np.ones((3, 4)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=np.ones((2, 5))), r"x must have rank 3.*\[2, 5\]"),
        (dict(kernel=np.ones((4, 3))), r"kernel must be \[3, 3\].*\[4, 3\]"),
        (dict(kernel=np.ones((3, 0))), "W must be at least 1, got 5 and 0"),
        (dict(kernel=np.ones((3, 4), int)), "kernel must be floating point, got int"),
        (dict(initial_state=np.ones((2, 4, 3))), r"initial_state must be \[2, 3, 3\]"),
        (dict(segments=np.ones((2, 4), int)), r"segments must be \[2, 5\]"),
        (dict(segments=np.ones((2, 5))), "segments must be integers, got float"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_faults_name_the_argument_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        causal_convolution(**VALID | change)
