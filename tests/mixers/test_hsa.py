"""Chunk encoder, retrieval and hierarchical sparse attention against a NumPy float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slopes import check_gradients

from hybridjax.config import UserError
from hybridjax.mixers.base import Context
from hybridjax.mixers.chunk_encoder import ChunkEncoder
from hybridjax.mixers.hsa import HSA
from hybridjax.mixers.retrieval import Retrieval, softmax_weights, stick_breaking_weights

WIDTH, C, R, K, HEADS, THETA, EPS = 12, 4, 6, 4, 4, 10_000.0, 1e-6


def layer(encoder=None, retrieval=None, reading=None):
    """The three mixers of one layer, with K/V heads for two groups of query heads."""
    keys = jax.random.split(jax.random.key(3), 3)
    shape = dict(chunk_size=C, kv_heads=2, head_dim=K, landmark_dim=R, encoder_heads=2, hidden=8)
    choose = dict(groups=shape["kv_heads"], landmark_dim=R, top_k=3) | (retrieval or {})
    return (
        ChunkEncoder(WIDTH, keys[0], **shape | (encoder or {})),
        Retrieval(WIDTH, keys[1], **choose),
        HSA(WIDTH, keys[2], heads=HEADS, head_dim=K, **(reading or {})),
    )


def output(mixers, x):
    encoder, retrieval, hsa = mixers
    ctx = Context.of_rows(x[..., 0])
    ctx = ctx.publish(encoder(x, ctx)[1])
    ctx = ctx.publish(retrieval(x, ctx)[1])
    return hsa(x, ctx)


# ---------------------------------------------------------------- the oracle, one row


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def norm(x, module=None):
    scale = 1.0 if module is None else array(module.scale)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def softmax(x, one=0.0):
    e = np.exp(x)
    return e / (e.sum(-1, keepdims=True) + one)


def rope(x):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None] * THETA ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def encoded(layer, x):
    """One chunk through one layer of the encoder."""
    y = norm(x, layer.attention_norm)
    split = lambda linear: (y @ array(linear.kernel)).reshape(len(y), 2, -1)
    q = rope(norm(split(layer.qkv.query), layer.qkv.query_norm))
    k = rope(norm(split(layer.qkv.key), layer.qkv.key_norm))
    weights = softmax(np.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5)
    o = np.einsum("hij,jhd->ihd", weights, split(layer.qkv.value)).reshape(len(y), -1)
    x = x + o @ array(layer.output.kernel)
    y = norm(x, layer.mlp_norm)
    gate = y @ array(layer.mlp.gate.kernel)
    hidden = gate / (1 + np.exp(-gate)) * (y @ array(layer.mlp.up.kernel))
    return x + hidden @ array(layer.mlp.output.kernel)


def memory(encoder, x):
    """Landmarks [N, G, R], keys and values [N, C, G, K] of the whole chunks of x [T, D]."""
    parts = []
    for chunk in np.split(x[: len(x) // C * C], len(x) // C):
        y = chunk if encoder.cls is None else np.vstack([chunk, array(encoder.cls)])
        for part in encoder.layers:
            y = encoded(part, y)
        y = y if encoder.norm is None else norm(y, encoder.norm)
        summary = y.mean(0) if encoder.cls is None else y[C]
        landmark = (summary @ array(encoder.landmark.kernel)).reshape(-1, R)
        keys = (y[:C] @ array(encoder.key.kernel)).reshape(C, -1, K)
        values = (y[:C] @ array(encoder.value.kernel)).reshape(C, -1, K)
        keys = keys if encoder.key_norm is None else norm(keys, encoder.key_norm)
        if encoder.landmark_norm is not None:
            landmark = norm(landmark, encoder.landmark_norm)
        parts.append((landmark, keys, values))
    return (np.stack(part) for part in zip(*parts))


def weighed(rule, scores):
    """Weights of chunks, the most recent first."""
    if rule == "softmax":
        return softmax(scores)
    broken = 1 / (1 + np.exp(-scores))
    left = np.concatenate([[1.0], np.cumprod(1 - broken)[:-1]])
    return broken * left


def oracle(mixers, x):
    encoder, retrieval, hsa = mixers
    landmarks, keys, values = memory(encoder, x)
    groups, kv_heads = landmarks.shape[1], keys.shape[2]
    q = (x @ array(retrieval.query.kernel)).reshape(len(x), groups, R)
    q = q if retrieval.norm is None else norm(q, retrieval.norm)
    read = (x @ array(hsa.query.kernel)).reshape(len(x), HEADS, K)
    read = read if hsa.query_norm is None else norm(read, hsa.query_norm)
    one, y = float(hsa.off_by_one), np.zeros((len(x), HEADS, K))
    for t in range(len(x)):
        held = t - t % retrieval.every
        visible = [n for n in range(len(landmarks)) if (n + 1) * C <= held]
        if retrieval.window:
            visible = [n for n in visible if (n + 1) * C <= held - retrieval.window + C]
        for h in range(HEADS if visible else 0):
            head = h // (HEADS // kv_heads)
            group = head // (kv_heads // groups)
            scores = landmarks[visible, group] @ q[held, group] * R**-0.5
            best = np.sort(np.argsort(scores)[-retrieval.top_k :])[::-1]
            scores = scores[best]
            if retrieval.recency_bias is not None:
                scores = scores + array(retrieval.recency_bias) * np.arange(len(best))
            k, v = (part[np.array(visible)[best], :, head] for part in (keys, values))
            logits = k @ read[t, h] * K**-0.5
            if retrieval.weights == "joint":
                weights = softmax(logits.reshape(-1), one).reshape(logits.shape)
            else:
                weights = softmax(logits, one) * weighed(retrieval.weights, scores)[:, None]
            y[t, h] = np.einsum("jc,jck->k", weights, v)
    return y.reshape(len(x), -1) @ array(hsa.output.kernel)


OPTIONS = {
    "softmax": {},
    "stick": dict(retrieval=dict(weights="stick", norm=True), encoder=dict(landmark_norm=True)),
    "joint": dict(
        encoder=dict(landmark="mean", encoder_layers=0),
        retrieval=dict(weights="joint"),
        reading=dict(off_by_one=True),
    ),
    "others": dict(
        encoder=dict(groups=1, landmark="mean", key_norm=False),
        retrieval=dict(groups=1, every=3, window=7, recency_bias=True),
        reading=dict(off_by_one=True, qk_norm=False),
    ),
}


def moved(mixers, rng):
    """The mixers with every parameter away from its initial value."""
    noise = lambda x: (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(noise, jax.device_get(mixers))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(o, id=name, marks=() if name in ("softmax", "stick") else pytest.mark.slow)
        for name, o in OPTIONS.items()
    ],
)
def test_output_and_gradient_are_the_oracles(rng, options):
    mixers = moved(jax.jit(lambda: layer(**options))(), rng)
    x, cotangent = rng.normal(size=(2, 22, WIDTH))
    loss = lambda mixers, x: (lambda y: (jnp.sum(y * cotangent), y))(output(mixers, x[None])[0])
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grad, grad_x), y = gradient(mixers, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, oracle(mixers, x), atol=2e-5)
    assert not y[:C].any()  # there is no whole chunk yet

    value = lambda mixers, x: np.sum(oracle(mixers, x) * cotangent)
    check_gradients(rng, value, mixers, x, (grad, grad_x))


# ---------------------------------------------------------------- weights


def test_weights_of_few_or_no_chunks_are_finite_and_so_are_their_gradients():
    scores = jnp.array([[3.0, -200.0, -jnp.inf], [-jnp.inf] * 3, [200.0, 200.0, 1.0]])
    for rule, sums in ((softmax_weights, [1, 0, 1]), (stick_breaking_weights, [0.95257, 0, 1])):
        weights, pull = jax.vjp(rule, scores)
        np.testing.assert_allclose(weights.sum(-1), sums, atol=1e-5)
        assert bool(jnp.isfinite(pull(jnp.ones_like(weights))[0]).all())
    assert stick_breaking_weights(scores)[2].tolist() == [1.0, 0.0, 0.0]  # the recent one has all


def test_noise_moves_the_choice_and_not_the_weights_of_what_is_chosen(rng):
    mixers = jax.jit(lambda: layer(retrieval=dict(noise=True, top_k=2)))()
    x = jnp.asarray(rng.normal(size=(1, 40, WIDTH)), jnp.float32)

    @jax.jit
    def choose(key):
        ctx = Context.of_rows(x[..., 0], key=key)
        ctx = ctx.publish(mixers[0](x, ctx)[1])
        return mixers[1](x, ctx)[1]["selection"]

    plain, noisy = choose(None), choose(jax.random.key(5))
    same = (noisy.indices == plain.indices).all(-1, keepdims=True)
    assert 0 < same.mean() < 1
    np.testing.assert_allclose(noisy.weights * same, plain.weights * same, atol=1e-6)


# ---------------------------------------------------------------- faults


FAULTS = {
    "cls without encoder": (lambda: layer(dict(encoder_layers=0)), "landmark='cls' needs an enc"),
    "unknown landmark": (lambda: layer(dict(landmark="max")), "landmark is 'max': use 'cls' or"),
    "unknown weights": (lambda: layer(retrieval=dict(weights="nsa")), "weights is 'nsa': use one"),
    "no chunk": (lambda: layer(retrieval=dict(top_k=0)), "top_k is 0 and every 1: both must be"),
    "heads of the encoder": (lambda: layer(dict(encoder_heads=5)), "encoder_heads is 5: it must"),
    "groups": (
        lambda: jax.eval_shape(
            output, layer(retrieval=dict(groups=1)), jnp.zeros((1, 2 * C, WIDTH))
        ),
        "retrieval has 1 groups of 6 and the memory",
    ),
    "heads": (
        lambda: jax.eval_shape(
            output, layer(dict(kv_heads=3, groups=1), dict(groups=1)), jnp.zeros((1, 8, WIDTH))
        ),
        "4 heads of 4 cannot read a memory of 3 K/V heads",
    ),
}


@pytest.mark.parametrize(("make", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_say_what_to_do(make, message):
    with pytest.raises(UserError, match=message):
        make()
