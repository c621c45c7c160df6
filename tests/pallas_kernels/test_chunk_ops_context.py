"""Retrieval and attention over chosen chunks of rows that are split are those of whole rows."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_linear_attention_context import distance, line_of

from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
from pallas_kernels.chunk_topk import chunk_topk

B, T, H, G, R, C, K = 2, 64, 4, 2, 6, 4, 5
SEGMENTS = np.stack([np.repeat([1, 2, 0], [37, 22, 5]), np.repeat([3], 64)]).astype(np.int32)
DOCUMENTS = np.stack([np.repeat([1, 0, 2, 0], [9, 1, 4, 2]), np.repeat([3], 16)]).astype(np.int32)


def random(rng):
    shapes = dict(rq=(B, T, G, R), landmarks=(B, T // C, G, R), q=(B, T, H, K), k=(B, T, G, K),
                  v=(B, T, G, K))
    return {name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}


def layer(arrays, segments, chunk_segments, context_axis=None):
    indices, scores = chunk_topk(
        arrays["rq"], arrays["landmarks"], k=3, chunk_size=C, segments=segments,
        chunk_segments=chunk_segments, noise_key=jax.random.key(0), context_axis=context_axis)
    o = chunk_sparse_attention(
        arrays["q"], arrays["k"], arrays["v"], indices, jax.nn.sigmoid(scores), chunk_size=C,
        context_axis=context_axis)
    return o, indices


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("devices", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_split_rows_are_the_whole_rows(devices, check_vma, rng):
    arrays = random(rng)
    do = rng.standard_normal((B, T, H, K)).astype("f")
    rows = P(None, "context")
    split = jax.shard_map(
        lambda *x: layer(*x, context_axis="context"), mesh=line_of(devices),
        in_specs=rows, out_specs=rows, check_vma=check_vma)

    def gradients(op):
        def loss(arrays):
            o, indices = op(arrays, SEGMENTS, DOCUMENTS)
            return (o * do).sum(), (o, indices)

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    expected, (o, indices) = gradients(layer)
    got, (o_split, indices_split) = gradients(split)
    np.testing.assert_array_equal(indices_split, indices)
    assert (np.asarray(indices) >= 0).any() and distance(o_split, o) < 1e-6
    assert max(distance(got[name], expected[name]) for name in arrays) < 1e-5


MERGED = {
    "weighed": (True, {}),
    "weighed off by one": (True, dict(off_by_one=True)),
    "joint": (False, {}),
    "joint off by one": (False, dict(off_by_one=True)),
    "joint with index": (False, dict(index=True)),
}
DEFAULT = {(4, "weighed"), (8, "joint off by one")}


@pytest.mark.parametrize(
    "devices, case",
    [
        pytest.param(n, case, marks=() if (n, case) in DEFAULT else pytest.mark.slow)
        for n in (2, 4, 8)
        for case in MERGED
    ],
)
def test_parts_of_a_memory_merge_into_the_whole(devices, case, rng):
    """Queries that are whole on every device, of a memory that is split; some see nothing."""
    arrays, do = random(rng), rng.standard_normal((B, T, H, K)).astype("f")
    weighed, how = MERGED[case]
    if "index" in how:
        how = dict(index=np.broadcast_to(np.arange(T) - 1, (B, T)))

    def read(arrays, documents, **split):
        indices, scores = chunk_topk(
            arrays["rq"], arrays["landmarks"], k=3, chunk_size=C, segments=SEGMENTS,
            chunk_segments=documents, **split)
        if "index" in how:  # the query's own chunk, of which it sees a part
            indices = indices.at[..., 0].set(np.arange(T)[:, None] // C)
        weights = jax.nn.sigmoid(scores) if weighed else None
        o = chunk_sparse_attention(
            arrays["q"], arrays["k"], arrays["v"], indices, weights, chunk_size=C, **how, **split)
        return o, (indices, scores)

    whole, rows = P(), P(None, "context")
    specs = dict(rq=whole, q=whole, landmarks=rows, k=rows, v=rows), rows
    split = jax.shard_map(
        lambda *x: read(*x, context_axis="context", exchange="merge"), mesh=line_of(devices),
        in_specs=specs, out_specs=whole, check_vma=False)

    def gradients(op):
        def loss(arrays):
            o, chosen = op(arrays, DOCUMENTS)
            return (o * do).sum(), (o, chosen)

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    expected, (o, chosen) = gradients(read)
    got, (o_split, chosen_split) = gradients(split)
    np.testing.assert_array_equal(chosen_split[0], chosen[0])
    np.testing.assert_allclose(chosen_split[1], chosen[1], rtol=1e-5)
    assert not np.asarray(o).any(axis=(2, 3)).all() and distance(o_split, o) < 1e-6
    assert max(distance(got[name], expected[name]) for name in arrays) < 1e-5


def test_equal_scores_of_parts_choose_the_latest():
    landmarks, q = np.ones((1, 16, 1, 2), "f"), np.ones((1, 1, 1, 2), "f")
    split = jax.shard_map(
        lambda q, x: chunk_topk(q, x, k=5, chunk_size=C, start=np.array([50]),
                                context_axis="context", exchange="merge")[0],
        mesh=line_of(4), in_specs=(P(), P(None, "context")), out_specs=P(), check_vma=False)
    assert split(q, landmarks).ravel().tolist() == [11, 10, 9, 8, 7]


def test_an_exchange_that_is_not_there_is_refused():
    x = np.ones((1, 4, 1, 2), "f")
    with pytest.raises(ValueError, match="exchange is 'ring': use None, or with a context_axis"):
        chunk_topk(x, x, k=1, chunk_size=1, exchange="ring")
    with pytest.raises(ValueError, match="exchange is 'merge': use None, or with a context_axis"):
        chunk_sparse_attention(x, x, x, np.zeros((1, 4, 1, 1), int), chunk_size=1, exchange="merge")
