"""Attention over chosen chunks of a memory that is split along a mesh axis: what moves.

With P devices, T queries of a row of N chunks, J of them for each query, and b bytes per number, a
device receives about

    b N C G (K + V)                 to gather all keys and values,
    b min(T J, N) C G (K + V)       to fetch what is chosen,
    4 T H V                         to sum outputs, where the queries are everywhere.

In training each device has N C / P queries of its own, and all but surely some query of them
chooses any given chunk: there fetching is gathering, and the gather can serve all layers that read
one memory. Queries that read a memory of before, as in decoding, are few, and one chunk of keys and
values is as large as the outputs of `b C G (K + V) / (4 H V)` queries: 4 with 16 heads of 64 over a
memory of one head in chunks of 64. There no chunk moves. The sum is exact, for a chunk's softmax is
its own; a joint softmax weighs the parts by their sums of exponentials (FlashDecoding).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_sparse_attention import xla


def merged(attend, q, k, v, indices, weights, index, *, chunk_size, scale, off_by_one, axis):
    """`attend` of queries that are whole on every device to this device's part of the memory, and
    the sum over the devices."""
    first = jax.lax.axis_index(axis) * (k.shape[1] // chunk_size)
    mine = (indices >= first) & (indices < first + k.shape[1] // chunk_size)
    indices = jnp.where(mine, indices - first, -1)
    index = None if index is None else index - first * chunk_size
    how = dict(chunk_size=chunk_size, scale=scale)
    if weights is not None:
        weights = jnp.where(mine, weights, 0)
        o = attend(q, k, v, indices, weights, index, off_by_one=off_by_one, **how)
        wide = jnp.promote_types(v.dtype, jnp.float32)
        return jax.lax.psum(o.astype(wide), axis).astype(v.dtype)
    o, logsumexp = xla.joint_softmax(q, k, v, indices, index, **how)
    largest = jax.lax.pmax(jax.lax.stop_gradient(logsumexp), axis)
    largest = jnp.maximum(largest, 0.0 if off_by_one else -1e30)  # of a query that sees nothing
    share = jnp.exp(logsumexp - largest)
    o, total = jax.lax.psum((share * o, share), axis)
    total += jnp.exp(-largest) if off_by_one else 0
    return (o / jnp.where(total == 0, 1, total)).astype(v.dtype)
