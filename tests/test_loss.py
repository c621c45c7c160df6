import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax import loss
from hybridjax.config import MeshConfig
from hybridjax.loss import next_token_loss
from hybridjax.sharding import make_mesh, place


class Head:
    """The part of a decoder that the loss reads."""

    def __init__(self, table):
        self.table = table

    def head_kernel(self):
        return self.table.T


def arguments(rng, batch=2, length=12, width=8, vocab=40):
    h = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
    targets = jnp.asarray(rng.integers(vocab, size=(batch, length)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(batch, length)), jnp.float32)
    return h, table, targets, weights


def total(h, table, targets, weights, z_loss=0.0):
    value, nats, hit = next_token_loss(Head(table), h, targets, weights, z_loss)
    return value, (nats, hit)


value_and_grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("z_loss", (0.0, 0.1))
def test_it_is_the_cross_entropy_and_the_square_of_log_z(rng, z_loss):
    h, table, targets, weights = arguments(rng)
    logits = np.einsum("btd,vd->btv", *(np.asarray(x, np.float64) for x in (h, table)))
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    value, (found, hit) = total(h, table, targets, weights, z_loss)
    np.testing.assert_allclose(found, nats, rtol=1e-5)
    np.testing.assert_allclose(value, np.sum(weights * (nats + z_loss * log_z**2)), rtol=1e-5)
    np.testing.assert_array_equal(hit, logits.argmax(-1) == targets)


@pytest.mark.parametrize("limit", (2 * 12 * 40 // 3, 2 * 12 * 40 // 5, 1), ids=("3", "6", "12"))
def test_slices_change_neither_values_nor_gradients(rng, monkeypatch, limit):
    args = (*arguments(rng), 0.01)
    whole = jax.jit(value_and_grad)(*args)
    monkeypatch.setattr(loss, "SLICE", limit)
    jaxpr = str(jax.make_jaxpr(lambda *a: value_and_grad(*a))(*args))
    assert "scan" in jaxpr and "f32[2,12,40]" not in jaxpr
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        whole,
        jax.jit(lambda *a: value_and_grad(*a))(*args),
    )


@pytest.mark.parametrize("length", (24, 18), ids=("rows split", "rows that 4 do not divide"))
def test_slices_of_rows_split_over_devices(rng, monkeypatch, length):
    args = (*arguments(rng, length=length), 0.01)
    expected = value_and_grad(*args)
    monkeypatch.setattr(loss, "SLICE", 100)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        h, table, *rest = args
        args = (place(h, "batch", "length", None), place(table, None, None), *rest)
        found = jax.device_get(jax.jit(lambda *a: value_and_grad(*a))(*args))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, found, expected)


def test_the_head_is_gathered_once_for_all_slices(rng, monkeypatch):
    h, table, *rest = arguments(rng, batch=4, vocab=48)
    monkeypatch.setattr(loss, "SLICE", 100)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        args = (place(h, "batch", "length", None), place(table, "vocab", "embed"), *rest, 0.01)
        text = jax.jit(lambda *a: value_and_grad(*a)).lower(*args).compile().as_text()
    lines = [line for line in text.splitlines() if re.search(r" all-[a-z-]+\(", line)]
    in_slices = [line for line in lines if "while/body" in line]
    head = re.compile(r"f32\[(8,24|24,8)\]")  # a device's part of the vocabulary
    assert in_slices and any(head.search(line) for line in lines)  # over `tensor`, of the softmax
    assert not any(head.search(line) for line in in_slices)


def test_the_logits_of_a_large_vocabulary_never_exist(monkeypatch):
    batch, length, width, vocab = 2, 512, 8, 32_768
    monkeypatch.setattr(loss, "SLICE", 2**20)
    struct = jax.ShapeDtypeStruct
    tokens = (batch, length)
    compiled = (
        jax.jit(lambda *a: value_and_grad(*a))
        .lower(
            struct((*tokens, width), jnp.float32),
            struct((vocab, width), jnp.float32),
            struct(tokens, jnp.int32),
            struct(tokens, jnp.float32),
        )
        .compile()
    )
    logits = 4 * batch * length * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4
