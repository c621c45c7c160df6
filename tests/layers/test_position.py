"""Rotary positions are exact far beyond where f32 angles are noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax.layers.position import MAX_POSITION, rotary_angles, rotate

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
