"""Every layer is aligned as if it were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import batch_of, conversion, mixers_of, teacher_of

from hybridjax.config import MeshConfig, OptimizerConfig
from hybridjax.halo.alignment import (
    alignment_gradients,
    alignment_optimizer,
    clip_by_layer_norm,
    layer_norms,
)
from hybridjax.halo.config import run_config
from hybridjax.mixers.base import Context
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import make_mesh, place_parameters
from hybridjax.train import first_state, make_train_step, put_batch

DEPTH, STEPS = 3, 4


def halo_of(clip, limit=1e-3):
    """The limit is far below the norms, so that everything is clipped."""
    halo = conversion("T" * DEPTH)
    optimizer = OptimizerConfig(learning_rate=0.01, clip=limit)
    return dataclasses.replace(
        halo, align=dataclasses.replace(halo.align, clip=clip, optimizer=optimizer)
    )


def align(halo, batches, accumulate=1):
    """(losses by layer, mixers) after a step for each batch."""
    teacher = teacher_of(halo)
    mixers = mixers_of(halo, teacher)
    optimizer = alignment_optimizer(halo.align, DEPTH, mixers)
    state = first_state(mixers, optimizer)
    config = run_config(halo, "align", halo.model)
    config = dataclasses.replace(config, accumulate=accumulate)
    step, errors = make_train_step(optimizer, config, alignment_gradients), []
    for batch in batches:
        state, scalars = step(state, batch, teacher)
        errors.append([float(scalars[f"error_{i}"]) for i in range(DEPTH)])
    return np.array(errors), state.model


def align_alone(halo, layer, batches):
    """The same for one layer, by a loop over the teacher's blocks and a loss written out."""
    teacher = teacher_of(halo)
    mixer = jax.tree.map(lambda x: x[layer], mixers_of(halo, teacher))
    optimizer = make_optimizer(halo.align.optimizer, halo.align.steps, mixer)
    opt_state = optimizer.init(mixer)

    @jax.jit
    def step(mixer, opt_state, batch):
        ctx = Context(batch["positions"], batch["segments"])
        h = teacher.embedding(batch["tokens"], jnp.float32)
        for i in range(layer):
            h, _ = teacher.layer(i)(h, ctx)
        block = teacher.layer(layer)
        x = block.norms[0](h)
        target = block.mixers[0](x, ctx)
        real = batch["segments"] > 0
        loss = lambda m: jnp.mean(jnp.square(m(x, ctx) - target), where=real[..., None])
        updates, opt_state = optimizer.update(jax.grad(loss)(mixer), opt_state, mixer)
        return optax.apply_updates(mixer, updates), opt_state

    for batch in batches:
        mixer, opt_state = step(mixer, opt_state, batch)
    return mixer


def test_a_layer_in_the_joint_run_is_the_layer_alone(rng):
    halo, batches = halo_of("layer"), [batch_of(rng) for _ in range(STEPS)]
    together = align(halo, batches)[1]
    for layer in (0, DEPTH - 1):
        alone = align_alone(halo, layer, batches)
        close = lambda a, b, layer=layer: np.testing.assert_allclose(
            a[layer], b, rtol=1e-6, atol=1e-6 * np.abs(b).max()
        )
        jax.tree.map(close, together, alone)


def test_the_loss_falls_on_every_layer(rng):
    batch = batch_of(rng)
    errors, _ = align(halo_of("layer", limit=1.0), [batch] * 12)
    assert (errors[-1] < 0.7 * errors[0]).all(), errors


def test_each_layer_is_clipped_by_its_own_norm():
    gradients = {"a": jnp.array([[3.0, 0.0], [0.3, 0.0]]), "b": jnp.array([[[4.0]], [[0.4]]])}
    clipped, _ = clip_by_layer_norm(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(layer_norms(gradients), [5.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(layer_norms(clipped), [1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(clipped["a"], [[0.6, 0.0], [0.3, 0.0]], rtol=1e-6)


@pytest.mark.slow
def test_the_published_clipping_is_not_by_layer(rng):
    batch = batch_of(rng)
    by_layer, by_all = (align(halo_of(clip), [batch] * 2)[1] for clip in ("layer", "global"))
    same = jax.tree.map(np.array_equal, by_layer, by_all)
    assert not all(jax.tree.leaves(same))


@pytest.mark.slow
@pytest.mark.parametrize("clip", ("layer", "global"))
def test_microbatches_are_the_whole_batch(rng, clip):
    halo, batch = halo_of(clip), batch_of(rng, batch=4)
    whole, parts = (align(halo, [batch], n)[1] for n in (1, 2))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, whole, parts)


@pytest.mark.slow
def test_gradients_on_a_mesh_are_those_of_one_device(rng):
    halo, batch = halo_of("layer"), jax.device_get(batch_of(rng, batch=4))

    def gradients_on(mesh):
        with jax.set_mesh(mesh):
            teacher = jax.jit(place_parameters)(teacher_of(halo))
            mixers, there = mixers_of(halo, teacher), put_batch(batch)
            weight = jnp.sum(there["loss_weights"])
            gradients = jax.jit(alignment_gradients)(mixers, there, weight, None, teacher)
            return jax.device_get(gradients)

    one = gradients_on(make_mesh(MeshConfig(), jax.devices()[:1]))
    many = gradients_on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, one, many)
