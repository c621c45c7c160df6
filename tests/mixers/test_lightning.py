"""The lightning mixer against a NumPy float64 oracle of HypeNet's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax.mixers.base import Context
from hybridjax.mixers.lightning import Lightning
from pallas_kernels.linear_attention.decay import alibi_slopes

EPS = 1e-6


def test_decays_are_the_published_ones():
    decay = np.exp(-alibi_slopes(32))
    published = [0.4313237, 0.4930687, 0.5517813, 0.6065307]
    np.testing.assert_allclose(decay[:4], published, atol=5e-8)
    np.testing.assert_allclose(decay[-1], 0.9961014, atol=5e-8)


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def rope(x, theta):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def oracle(p, x, heads, kv_heads, theta):
    """arXiv 2601.22156, eq. 18-19, token by token, for one row."""
    T, group = x.shape[0], heads // kv_heads
    split = lambda y, n: y.reshape(T, n, -1)
    q = rope(norm(split(x @ p["query"], heads), p["query_norm"]), theta)
    k = rope(norm(split(x @ p["key"], kv_heads), p["key_norm"]), theta)
    v = split(x @ p["value"], kv_heads)
    K = q.shape[-1]
    out = np.zeros((T, heads, K))
    for h in range(heads):
        state = np.zeros((K, K))
        for t in range(T):
            state = np.exp(-(2.0 ** (-8 * (h + 1) / heads))) * state
            state += np.outer(k[t, h // group], v[t, h // group])
            out[t, h] = q[t, h] @ state / np.sqrt(K)
    gate = 1 / (1 + np.exp(-x @ p["gate"]))
    return (norm(out.reshape(T, -1), p["output_norm"]) * gate) @ p["output"]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_lightning_is_the_papers_recurrence(rng, kv_heads):
    mixer = Lightning(24, jax.random.key(0), heads=4, head_dim=16, kv_heads=kv_heads, theta=5e4)
    for norm_layer in (mixer.qkv.query_norm, mixer.qkv.key_norm, mixer.output_norm):
        norm_layer.scale[...] = jnp.asarray(rng.uniform(0.5, 2, norm_layer.scale.shape))
    linear = dict(
        query=mixer.qkv.query,
        key=mixer.qkv.key,
        value=mixer.qkv.value,
        gate=mixer.output.gate,
        output=mixer.output,
    )
    norms = dict(
        query_norm=mixer.qkv.query_norm,
        key_norm=mixer.qkv.key_norm,
        output_norm=mixer.output_norm,
    )
    p = {name: np.asarray(part.kernel[...], np.float64) for name, part in linear.items()}
    p |= {name: np.asarray(part.scale[...], np.float64) for name, part in norms.items()}
    x = rng.normal(size=(2, 150, 24)).astype(np.float32)
    y = mixer(jnp.asarray(x), Context.of_rows(x[..., 0]))
    expected = [oracle(p, row.astype(np.float64), 4, kv_heads, 5e4) for row in x]
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
