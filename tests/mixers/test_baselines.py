"""MoBA, native sparse and landmark attention against NumPy float64 oracles, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slopes import check_gradients

from hybridjax.config import UserError
from hybridjax.mixers.base import Context
from hybridjax.mixers.landmark import Landmark
from hybridjax.mixers.moba import MoBA
from hybridjax.mixers.nsa import NSA

WIDTH, T, C, H, G, K, WINDOW, THETA = 12, 22, 4, 4, 2, 4, 6, 10_000.0
SHAPE = dict(heads=H, kv_heads=G, head_dim=K, chunk_size=C)


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def norm(x, module):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * array(module.scale)


def rope(x):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None] * THETA ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def attend(q, k, v):
    """One query over some keys; 0 where there are none."""
    if not len(k):
        return np.zeros(K)
    p = np.exp(k @ q * K**-0.5)
    return p @ v / p.sum()


def heads_of(mixer, x):
    """q [T, H, K], and k, v of as many heads."""
    split = lambda linear: (x @ array(linear.kernel)).reshape(len(x), -1, K)
    q = rope(norm(split(mixer.qkv.query), mixer.qkv.query_norm))
    k = rope(norm(split(mixer.qkv.key), mixer.qkv.key_norm))
    return q, *(np.repeat(y, H // G, axis=1) for y in (k, split(mixer.qkv.value)))


def tokens_of(chunks, t):
    """The tokens of these chunks up to the query's own."""
    return [s for n in sorted(chunks) for s in range(n * C, n * C + C) if s <= t]


def output(mixer, o, x):
    o = o.reshape(len(x), -1)
    if mixer.output.gate is not None:
        o = o * sigmoid(x @ array(mixer.output.gate.kernel))
    return o @ array(mixer.output.kernel)


def moba(mixer, x):
    q, k, v = heads_of(mixer, x)
    o = np.zeros_like(q)
    for t, h in np.ndindex(len(x), H):
        gate = [k[n * C : n * C + C, h].mean(0) @ q[t, h] for n in range(t // C)]
        best = np.argsort(gate)[::-1][: mixer.top_k - 1]
        keys = tokens_of({t // C, *best}, t)
        o[t, h] = attend(q[t, h], k[keys, h], v[keys, h])
    return output(mixer, o, x)


def nsa(mixer, x):
    q, k, v = heads_of(mixer, x)
    o, gates = np.zeros_like(q), sigmoid(x @ array(mixer.views.kernel)).reshape(len(x), H, 3)
    means = lambda y: y[: len(x) // C * C].reshape(-1, C, H, K).mean(1)
    short_k, short_v = means(k), means(v)
    for t, g in np.ndindex(len(x), G):
        heads, whole = range(g * H // G, (g + 1) * H // G), (t + 1) // C
        importance = np.zeros(whole)
        for h in heads:
            p = np.exp(short_k[:whole, h] @ q[t, h] * K**-0.5)
            importance += p / p.sum()
        best = np.argsort(importance[: t // C])[::-1][: mixer.top_k - 1]
        keys, recent = tokens_of({t // C, *best}, t), slice(max(t - WINDOW + 1, 0), t + 1)
        for h in heads:
            views = (
                attend(q[t, h], short_k[:whole, h], short_v[:whole, h]),
                attend(q[t, h], k[keys, h], v[keys, h]),
                attend(q[t, h], k[recent, h], v[recent, h]),
            )
            o[t, h] = sum(gates[t, h, i] * view for i, view in enumerate(views))
    return output(mixer, o, x)


def landmark(mixer, x):
    q, k, v = heads_of(mixer, x)
    landmarks = (x @ array(mixer.landmark.kernel)).reshape(len(x), -1, K)
    landmarks = np.repeat(rope(norm(landmarks, mixer.landmark_norm)), H // G, axis=1)
    o = np.zeros_like(q)
    for t, h in np.ndindex(len(x), H):
        scores = np.exp(landmarks[C - 1 : t // C * C : C, h] @ q[t, h] * K**-0.5)
        best = np.argsort(scores)[::-1][: mixer.top_k]
        own = np.arange(t // C * C, t + 1)
        local = np.exp(k[own, h] @ q[t, h] * K**-0.5)
        total = scores[best].sum() + local.sum()
        o[t, h] = local @ v[own, h] / total
        for n in best:
            tokens = slice(n * C, n * C + C)
            o[t, h] += scores[n] / total * attend(q[t, h], k[tokens, h], v[tokens, h])
    return output(mixer, o, x)


CASES = {
    "landmark": (Landmark, SHAPE, landmark),
    "landmark-few": (Landmark, SHAPE | dict(top_k=2, gate=False), landmark),
    "moba": (MoBA, SHAPE | dict(top_k=3), moba),
    "nsa": (NSA, SHAPE | dict(top_k=3, window=WINDOW), nsa),
}


ROWS = [
    pytest.param(*case, id=name, marks=pytest.mark.slow if name == "landmark" else ())
    for name, case in CASES.items()
]


@pytest.mark.parametrize("kind, options, oracle", ROWS)
def test_output_and_gradient_are_the_oracles(rng, kind, options, oracle):
    mixer = jax.jit(lambda: kind(WIDTH, jax.random.key(3), **options))()
    moved = lambda p: p + 0.3 * jnp.asarray(rng.normal(size=p.shape), p.dtype)
    mixer = jax.tree.map(moved, mixer)
    x, cotangent = rng.normal(size=(2, T, WIDTH))

    def loss(mixer, x):
        y = mixer(x[None], Context.of_rows(x[None, :, 0]))[0]
        return jnp.sum(y * cotangent), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grad, grad_x), y = gradient(mixer, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, oracle(mixer, x), atol=3e-5)

    value = lambda mixer, x: np.sum(oracle(mixer, x) * cotangent)
    check_gradients(rng, value, mixer, x, (grad, grad_x))


FAULTS = {
    "landmark": (
        lambda: Landmark(WIDTH, jax.random.key(0), heads=H, head_dim=K, chunk_size=0),
        "chunk_size is 0, top_k None: both must be at least 1",
    ),
    "moba": (lambda: MoBA(WIDTH, jax.random.key(0), **SHAPE, top_k=0), "chunk_size is 4, top_k 0"),
    "nsa": (
        lambda: NSA(WIDTH, jax.random.key(0), **SHAPE, top_k=1, window=0),
        "chunk_size is 4, top_k 1, window 0: at least 1",
    ),
}


@pytest.mark.parametrize("make, line", FAULTS.values(), ids=FAULTS)
def test_faults_say_what_to_do(make, line):
    with pytest.raises(UserError, match=line):
        make()
