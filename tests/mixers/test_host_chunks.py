"""A memory of chunks on the host: a call fetches what was chosen, once, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridjax import host_memory
from hybridjax.mixers.host_chunks import HostChunks, for_host

B, N, C, G, K, M = 2, 30, 2, 2, 3, 4
COUNT = np.array([21, 3])  # whole chunks: in the second row all are recent


def memory(rng):
    """The chunks, and the same as a memory that holds NaN wherever nothing must be read."""
    chunks = rng.normal(size=(2, B, N, C, G, K)).astype(np.float32)
    on_host, recent = chunks.copy(), np.full((2, B, M, C, G, K), np.nan, np.float32)
    for row, whole in enumerate(COUNT):
        for n in range(max(whole - M, 0), whole):
            recent[:, row, n % M] = chunks[:, row, n]
        on_host[:, row, max(whole - M, 0) :] = np.nan
    on_host = map(jax.jit(lambda x: host_memory.to_host(for_host(x))), on_host)
    return chunks, HostChunks(*on_host, *recent, jnp.asarray(COUNT))


@pytest.mark.parametrize(("T", "J"), [(1, 3), (5, 4), (9, 5)])
def test_each_slot_finds_its_chunk(rng, T, J):
    chunks, on_host = memory(rng)
    indices = rng.integers(-1, COUNT[:, None, None, None], (B, T, G, J))
    keys, values, slots = jax.jit(lambda m, i: m.fetch(i))(on_host, indices)
    assert keys.shape[1] == min(N, T * G * J) * C
    empty, rows = indices < 0, np.arange(B)[:, None, None, None]
    np.testing.assert_array_equal(np.asarray(slots) < 0, empty)
    for found, kept in zip((keys, values), chunks, strict=True):
        found = np.asarray(found).reshape(B, -1, C, G, K)[rows, slots]
        np.testing.assert_array_equal(found[~empty], kept[rows, indices][~empty])
    for row in range(B):
        one_place = {n: set(slots[row][indices[row] == n].tolist()) for n in range(COUNT[row])}
        assert all(len(places) <= 1 for places in one_place.values())


def test_only_what_is_not_recent_is_read_from_the_host(rng, monkeypatch):
    """Of a call's thirty slots three chunks are distinct, and one of them is recent."""
    read, take = [], host_memory.take

    def watched(x, index, count):
        jax.debug.callback(lambda *seen: read.append(seen), index, count)
        return take(x, index, count)

    monkeypatch.setattr(host_memory, "take", watched)
    _, on_host = memory(rng)
    indices = np.tile(np.array([5, 2, 20])[None, None, None], (B, 5, G, 1))
    indices[1] = [0, 1, 2]
    jax.block_until_ready(jax.jit(lambda m, i: m.fetch(i))(on_host, indices))
    jax.effects_barrier()
    assert len(read) == 2  # once for keys, once for values
    assert all(int(count) == 2 and index[0, :2].tolist() == [2, 5] for index, count in read)


def test_what_is_written_out_of_range_changes_nothing(rng):
    x, new = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 3))
    index = np.array([[1, 2, 5], [0, 7, 4]])
    move = jax.jit(lambda *arrays: host_memory.to_device(
        host_memory.write(host_memory.to_host(arrays[0]), *arrays[1:])
    ))  # fmt: skip
    expected = x.copy()
    expected[0, [1, 2]], expected[1, [0, 4]] = new[0, :2], new[1, [0, 2]]
    np.testing.assert_allclose(move(x, new, index), expected, rtol=1e-6)
