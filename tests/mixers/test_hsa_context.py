"""A memory of chunks that decoding keeps split over devices: the same outputs, and little moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import TABLE, WIDTH, close, rows, stream

from hybridjax import mixers
from hybridjax.aot.collectives import collectives
from hybridjax.aot.hlo import parse
from hybridjax.config import MeshConfig, build
from hybridjax.mixers import chunk_memory
from hybridjax.mixers.base import Context
from hybridjax.sharding import make_mesh, place_parameters

ROWS, LENGTH, C = 2, 64, 4
MESHES = {
    "2": MeshConfig(data=2, tensor=2, context=2),
    "4": MeshConfig(data=1, tensor=2, context=4),
    "8": MeshConfig(data=1, context=8),
}


def new_stack(name):
    type, options = TABLE[name]
    return build(mixers.mixer(type, **options), mixers.MIXERS, WIDTH, jax.random.key(1))


def new_state(stack, length, chunks):
    state = stack.init_state(ROWS, length, jnp.float32)
    if chunks == "device":
        return state
    (memory,), *readers = state.layers
    layers = [(memory.with_chunks_on_host(),), *readers]
    return dataclasses.replace(state, layers=layers)


@jax.jit
def extend(stack, x, state):
    positions = state.length[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
    return stack.extend(x, state, Context(positions, jnp.ones_like(positions)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mesh, chunks",
    [
        (name, mesh, chunks)
        for name in ("hsa", "hsa-joint", "hsa-stick")
        for mesh in MESHES
        for chunks in ("device", "host")
    ],
)
def test_a_split_memory_is_read_as_the_whole(rng, monkeypatch, name, mesh, chunks):
    monkeypatch.setattr(chunk_memory, "RECENT", 2)
    stack = new_stack(name)
    x = stream(rng, ROWS, 45)
    expected = jax.jit(lambda stack, x: stack(x, rows(x)))(stack, x)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        placed = place_parameters(stack)
        state = jax.jit(lambda: new_state(placed, LENGTH, chunks))()
        (memory,) = state.layers[0]
        for part in (memory.landmarks, memory.keys, memory.values):
            assert part.sharding.shard_shape(part.shape)[1] == LENGTH // C // int(mesh)
        outputs = []
        for start, end in ((0, 33), (33, 39), *((t, t + 1) for t in range(39, 45))):
            y, state = extend(placed, x[:, start:end], state)
            outputs.append(np.asarray(y))
    close(np.concatenate(outputs, axis=1), expected)


@pytest.mark.parametrize("chunks", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_no_chunk_and_no_landmark_leaves_its_device(rng, chunks):
    """In the program of one more token, all that is sent is less than a device's landmarks."""
    stack, length = new_stack("hsa"), 4096
    mesh = make_mesh(MESHES["8"])
    with jax.set_mesh(mesh):
        placed = place_parameters(stack)
        state = jax.jit(lambda: new_state(placed, length, chunks))()
        program = extend.lower(placed, stream(rng, ROWS, 1), state).compile().as_text()
    found = collectives(parse(program), mesh)
    (memory,) = state.layers[0]
    assert any(c.kind == "all-gather" for c in found)  # of the candidates
    assert 0 < sum(c.sent for c in found) < memory.landmarks.nbytes / 8
