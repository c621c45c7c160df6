"""The divergence, its gradients, its memory, and the step on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import batch_of, conversion, mixers_of, teacher_of

from hybridjax import loss
from hybridjax.config import MeshConfig
from hybridjax.halo.config import run_config
from hybridjax.halo.distillation import distillation_sums, kl_divergence
from hybridjax.halo.transfer import student
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import make_mesh, place, place_parameters
from hybridjax.train import first_state, gradients_of, make_train_step, put_batch


class Head:
    """The part of a decoder that the divergence reads."""

    def __init__(self, kernel):
        self.kernel = kernel

    def head_kernel(self):
        return self.kernel


def arguments(rng, batch=2, length=12, width=8, vocab=40):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    h, g = normal(batch, length, width), normal(batch, length, width)
    targets = jnp.asarray(rng.integers(vocab, size=(batch, length)), jnp.int32)
    return h, normal(width, vocab), g, normal(width, vocab), targets


def total(h, head, g, teacher_head, targets):
    kl, hit = kl_divergence(Head(head), h, Head(teacher_head), g, targets)
    return jnp.sum(kl), (kl, hit)


value_and_grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


def oracle(h, head, g, teacher_head):
    """In float64: each token's divergence, and the gradient of its sum to h and to the head."""
    h, head, g, teacher_head = (np.asarray(x, np.float64) for x in (h, head, g, teacher_head))

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(g @ teacher_head), log_softmax(h @ head)
    difference = np.exp(log_q) - np.exp(log_p)  # of the divergence to the student's logits
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return kl, difference @ head.T, np.einsum("btd,btv->dv", h, difference)


@pytest.mark.parametrize("limit", (2**26, 2 * 12 * 40 // 3, 1), ids=("whole", "3 slices", "12"))
def test_it_is_the_divergence_from_the_teacher(rng, monkeypatch, limit):
    monkeypatch.setattr(loss, "SLICE", limit)
    args = arguments(rng)
    (_, (kl, hit)), grads = jax.jit(lambda *a: value_and_grad(*a))(*args)
    expected, *expected_grads = oracle(*args[:4])
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(grads, expected_grads):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    h, head, *_, targets = args
    np.testing.assert_array_equal(hit, np.argmax(h @ head, -1) == targets)


def test_it_is_zero_of_the_teacher_itself_and_has_no_gradient_to_the_teacher(rng):
    h, head, g, teacher_head, targets = arguments(rng)
    kl, _ = kl_divergence(Head(head), h, Head(head), h, targets)
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    to_teacher = jax.grad(lambda w: total(h, head, g, w, targets)[0])(teacher_head)
    assert not np.any(to_teacher)


def test_memory_does_not_grow_with_the_length(monkeypatch):
    monkeypatch.setattr(loss, "SLICE", 2**20)
    struct, width, vocab = jax.ShapeDtypeStruct, 8, 16_384

    def peak(length):
        rows = struct((2, length, width), jnp.float32)
        kernel = struct((width, vocab), jnp.float32)
        program = jax.jit(lambda *a: value_and_grad(*a)).lower(
            rows, kernel, rows, kernel, struct((2, length), jnp.int32)
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    short, long = peak(256), peak(512)
    assert long < 1.05 * short, (short, long)
    assert long < 4 * 2 * 512 * vocab  # the logits of one model


MESH = MeshConfig(data=2, fsdp=1, tensor=2, context=2)


@pytest.mark.slow
def test_a_step_on_a_mesh_is_the_step_on_one_device(rng):
    halo, batch = conversion(), jax.device_get(batch_of(rng, batch=4))

    def step_on(mesh):
        with jax.set_mesh(mesh):
            teacher = jax.jit(place_parameters)(teacher_of(halo))
            mixers = mixers_of(halo, teacher)
            build = lambda t, m: student(halo, halo.model, "AL", t, m)
            model = jax.jit(build)(teacher, mixers)
            optimizer = make_optimizer(halo.distill.optimizer, 5, model)
            state = jax.jit(lambda model: first_state(model, optimizer))(model)
            gradients = gradients_of(distillation_sums)
            config = run_config(halo, "distill", halo.model)
            step = make_train_step(optimizer, config, gradients)
            state, scalars = step(state, put_batch(batch), teacher)
            return jax.device_get((state.model, scalars))

    one, many = step_on(make_mesh(MeshConfig(), jax.devices()[:1])), step_on(make_mesh(MESH))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    jax.tree.map(close, one, many)


def test_the_divergence_on_a_mesh(rng, monkeypatch):
    args = arguments(rng)
    expected = value_and_grad(*args)
    monkeypatch.setattr(loss, "SLICE", 100)
    with jax.set_mesh(make_mesh(MESH)):
        h, head, g, teacher_head, targets = args
        rows = [place(x, "batch", "length", None) for x in (h, g)]
        heads = [place(x, "embed", "vocab") for x in (head, teacher_head)]
        args = (rows[0], heads[0], rows[1], heads[1], targets)
        found = jax.device_get(jax.jit(lambda *a: value_and_grad(*a))(*args))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, found, expected)


@pytest.mark.slow
def test_the_student_learns_from_a_step(rng):
    """The divergence falls on the batch that was seen."""
    halo, batch = conversion(), batch_of(rng)
    teacher = teacher_of(halo)
    model = student(halo, halo.model, "LA", teacher, mixers_of(halo, teacher))
    model = jax.tree.map(jnp.copy, model)  # a step donates it, and not the teacher's part of it
    config = dataclasses.replace(run_config(halo, "distill", halo.model), accumulate=2)
    optimizer = make_optimizer(config.optimizer, 5, model)
    step = make_train_step(optimizer, config, gradients_of(distillation_sums))
    state, losses = first_state(model, optimizer), []
    for _ in range(4):
        state, scalars = step(state, batch, teacher)
        losses.append(float(scalars["loss"]))
    np.testing.assert_allclose(scalars["loss"], scalars["kl"], rtol=1e-5)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0], losses
