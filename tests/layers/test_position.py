"""Rotary positions are exact far beyond where f32 angles are noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax.config import UserError
from hybridjax.layers.position import MAX_POSITION, frequencies, rotary_angles, rotate

WIDTH = 64


def rotated(x, positions, theta):
    positions = jnp.asarray(positions, jnp.int32)[None]
    return rotate(jnp.asarray(x)[None], rotary_angles(positions, WIDTH, theta))[0]


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_scores_depend_on_distance_alone_up_to_the_last_position(rng, theta):
    t = np.array([5000, 10**6, 2**24 + 1, MAX_POSITION])
    for distance in (0, 1, 17, 4097):
        q = rng.normal(size=(len(t), 2, WIDTH)).astype(np.float32) / 8
        k = rng.normal(size=(len(t), 2, WIDTH)).astype(np.float32) / 8
        far = jnp.sum(rotated(q, t, theta) * rotated(k, t - distance, theta), -1)
        near = jnp.sum(rotated(q, t * 0 + distance, theta) * rotated(k, t * 0, theta), -1)
        np.testing.assert_allclose(far, near, atol=1e-5)


def test_angles_are_those_of_float64():
    t = np.array([0, 1, 4095, 4096, 123_456_7, MAX_POSITION])
    cos, sin = rotary_angles(jnp.asarray(t)[None], WIDTH, 1e4)
    angle = t[:, None] * 1e4 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_pair_is_a_complex_number_and_the_rest_of_the_head_is_not_rotated(rng, interleaved):
    t, x = np.array([[0, 3, 70_000]]), rng.normal(size=(1, 3, 2, WIDTH)).astype(np.float32)
    width = WIDTH // 2
    first, second = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (
        slice(0, width // 2), slice(width // 2, width))  # fmt: skip
    y = rotate(jnp.asarray(x), rotary_angles(jnp.asarray(t), width, 1e4), interleaved)
    turn = np.exp(1j * t[..., None, None] * frequencies(width, 1e4))
    expected = (x[..., first] + 1j * x[..., second]) * turn
    np.testing.assert_allclose(y[..., first], expected.real, atol=1e-5)
    np.testing.assert_allclose(y[..., second], expected.imag, atol=1e-5)
    np.testing.assert_array_equal(y[..., width:], x[..., width:])


LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def test_scaled_frequencies():
    plain = frequencies(WIDTH, 5e5)
    linear = frequencies(WIDTH, 5e5, (("factor", 4.0), ("rope_type", "linear")))
    np.testing.assert_allclose(linear, plain / 4)
    llama3, waves = frequencies(WIDTH, 5e5, tuple(LLAMA3.items())), 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(llama3[waves > 4], plain[waves > 4])
    np.testing.assert_allclose(llama3[waves < 1], plain[waves < 1] / 8)
    assert np.all(np.diff(llama3) < 0) and np.any((waves > 1) & (waves < 4))


LONG = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
YARN = {  # theta, further options; frequencies and amplitude as `transformers` has them
    "defaults": (
        1e4, {},
        [1, 0.25693506, 0.0625, 0.013834965, 0.0025, 7.9056947e-4, 2.5e-4, 7.9056947e-5],
        1.138629436111989,
    ),
    "given": (
        1e6, dict(beta_fast=16, beta_slow=2, attention_factor=1.5),
        [1, 0.13337095, 0.015811389, 1.405853e-3, 2.5e-4, 4.445699e-5, 7.905694e-6, 1.405853e-6],
        1.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("theta, options, expected, size", YARN.values(), ids=YARN)
def test_yarn_is_that_of_published_code(theta, options, expected, size):
    scaling = tuple((LONG | options).items())
    np.testing.assert_allclose(frequencies(16, theta, scaling), expected, rtol=1e-6)
    t = np.array([[3, 40_000]])
    cos, sin = rotary_angles(jnp.asarray(t), 16, theta, scaling)
    angle = t[..., None, None] * frequencies(16, theta, scaling)
    np.testing.assert_allclose(cos, size * np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(sin, size * np.sin(angle), atol=2e-6)


FAULTS = {
    "odd": (dict(width=7), "even number of dimensions, not 7"),
    "type": (dict(scaling=(("rope_type", "ntk"),)), "no rope_scaling of type 'ntk': there are "),
    "missing": (dict(scaling=(("rope_type", "yarn"), ("factor", 2.0))), "takes .'attention_factor"),
    "few": (dict(width=2, scaling=tuple(LONG.items())), "needs at least 4 rotated dimensions"),
    "options": (dict(scaling=(("a", 1), ("rope_type", "linear"))), "takes .'factor'., not .'a'"),
}


@pytest.mark.parametrize("given, line", FAULTS.values(), ids=FAULTS)
def test_frequencies_that_cannot_be(given, line):
    with pytest.raises(UserError, match=line):
        frequencies(**dict(width=WIDTH, theta=1e4) | given)
