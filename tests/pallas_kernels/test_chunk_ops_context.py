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
    shapes = dict(rq=(B, T, G, R), landmarks=(B, T // C, G, R), q=(B, T, H, K), k=(B, T, G, K),
                  v=(B, T, G, K))
    arrays = {name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}
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
