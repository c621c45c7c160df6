"""Attention over chosen chunks on Hopper GPUs. bfloat16 inputs. Compiled for sm_90a and run in
JAX's interpreter; not yet run on hardware.

**Kernels** (gpu_kernels.py). The equations are those of xla.py. Logits lie as [keys, heads],

    S = scale K q^T        O^T += V^T (w P)        dP = V dO^T        dQ^T += K^T dS

so that the 64 keys of a chunk are the rows of a product and the heads of a group its columns, 8 or
more: no row is padding, whatever their number. `forward` and `by_query` (dq, dw) take one query and
group, whose chunks arrive one after the other. Softmaxes then run down columns; `forward` keeps the
logarithm of each one's denominator, [B, T, G, J, R] numbers or, if joint, [B, T, G, R], and
`by_query` finds `d`. With both, a pair of a query and a slot is worked out without looking at any
other, which is what `by_chunk` does:

    dK += dS Q        dV += (w P) dO

over the pairs that hold a chunk, which sorting by chunk has put side by side. The queries of 64
columns of pairs are gathered by TMA; what belongs to pairs and heads (lse, d, w) is sorted outside.
Where chunks are few, several thread blocks share one, and their sums are added in a fixed order.

**Work.** At K = V = 64 with 16 heads to a group, `forward` fetches 16 kB per pair
for 0.26 MFLOP: 16 FLOP to a byte, so fetching bounds it, from L2 where that holds the row.
`by_query` fetches the same for 0.39 MFLOP; `by_chunk` 4.3 kB for 0.52 MFLOP.

Chunks of fewer than 64 keys are filled up, and cost what 64 do. The pairs of a chunk are shared out
evenly, but no two chunks' are: one that most queries choose keeps its thread blocks busy alone.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.arguments import refuse_traced
from pallas_kernels.chunk_sparse_attention import gpu_kernels
from pallas_kernels.chunk_sparse_attention.gpu_kernels import Plan
from pallas_kernels.hopper import COLUMNS, C
from pallas_kernels.selection import pairs_by_chunk

BLOCKS = 528  # four on each of an H100's or H200's 132 SMs


def chunk_sparse_attention(q, k, v, indices, weights, index, *, chunk_size, scale, off_by_one):
    hopper.refuse_target()
    _refuse_arguments(q, k, v, indices, chunk_size, scale)
    (B, T, H, K), G, V, indices = q.shape, k.shape[2], v.shape[-1], indices.astype(jnp.int32)
    last = chunk_size if index is None else index[..., None, None] + 1 - indices * chunk_size
    seen = jnp.where(indices < 0, 0, jnp.clip(last, 0, chunk_size))
    q = _filled(q.reshape(B, T, G, H // G, K), {3: _columns(H // G), 4: COLUMNS})
    k, v = (_filled(x.reshape(B, -1, chunk_size, G, x.shape[-1]), {2: C, 4: COLUMNS})
            for x in (k, v))
    k, v = (x.reshape(B, -1, G, x.shape[-1]) for x in (k, v))
    plan = Plan(float(scale), off_by_one, weights is None)
    weights = None if weights is None else weights.astype(jnp.float32)
    o = _attend(plan, q, k, v, jnp.maximum(indices, 0), seen, weights)
    return o[:, :, :, :H // G, :V].reshape(B, T, H, V)


def _refuse_arguments(q, k, v, indices, chunk_size, scale):
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 (float32 products would be tf32, 1e-3), "
                                  f"got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(q.shape[-1], v.shape[-1]) > 128:
        raise NotImplementedError(f"needs K and V up to 128 (wider gradients leave the registers), "
                                  f"got {q.shape[-1]} and {v.shape[-1]}")
    if chunk_size > C:
        raise NotImplementedError(f"needs chunks of up to {C} keys, got chunk_size {chunk_size}")
    if q.shape[2] // k.shape[2] > C:
        raise NotImplementedError(f"needs up to {C} query heads for each of keys, "
                                  f"got {q.shape[2]} for {k.shape[2]}")
    columns = q.shape[1] * indices.shape[-1] * _columns(q.shape[2] // k.shape[2])
    if columns >= 2**31:
        raise NotImplementedError(f"counts pairs of queries, slots and heads in 32 bits, "
                                  f"got {columns} in a row")
    refuse_traced(scale)
    if k.shape[1] == 0:
        raise NotImplementedError("needs at least one chunk")


def _columns(heads):
    """Columns of a product for a group's heads: whole groups of 8, and they divide a tile."""
    return max(8, 1 << (heads - 1).bit_length())


def _filled(x, multiples):
    """With zeros, up to a multiple along an axis."""
    return jnp.pad(x, [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, indices, seen, weights):
    return gpu_kernels.forward(plan, q, k, v, indices, seen, weights, keep=False)["o"]


def _attend_forward(plan, *arrays):
    out = gpu_kernels.forward(plan, *arrays, keep=True)
    return out["o"], (*arrays, out)


def _attend_backward(plan, saved, do):
    q, k, v, indices, seen, weights, out = saved
    lse, J = out["lse"], indices.shape[-1]
    d = None
    if plan.joint:
        d = (do.astype(jnp.float32) * out["o"].astype(jnp.float32)).sum(-1)
        d = jnp.broadcast_to(d[:, :, :, None], lse.shape)
    found = gpu_kernels.by_query(plan, q, k, v, do, indices, seen, weights, lse, d)
    d = found.get("d", d)
    sums = _by_chunk(plan, q, k, v, do, indices, seen, weights, lse, d)
    dk, dv = (sums[name].sum(0).astype(k.dtype) for name in ("dk", "dv"))
    dweights = None if plan.joint else d[:, :, :, :J].sum(-1)
    return found["dq"], dk, dv, None, None, dweights


_attend.defvjp(_attend_forward, _attend_backward)


def _by_chunk(plan, q, k, v, do, indices, seen, weights, lse, d):
    """Sorts the pairs, and what the kernel wants to know of each."""
    (B, T, G, R, _), J, N = q.shape, indices.shape[-1], k.shape[1] // C
    pairs, first = pairs_by_chunk(jnp.where(seen > 0, indices, -1), N)
    more = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, C // R), *[(0, 0)] * (x.ndim - 3)])
    sort = jax.vmap(jax.vmap(lambda x, at: x[at]))

    def of_pairs(x):
        """[B, T, G, J] -> [B, G, P, R]: the same for all heads."""
        x = sort(jnp.moveaxis(x, 2, 1).reshape(B, G, T * J), pairs)
        return jnp.broadcast_to(x.astype(jnp.float32)[..., None], (*x.shape, R))

    def of_heads(x):
        """[B, T, G, rows, R] -> [B, G, P, R]."""
        rows = x.shape[3]
        at = pairs // J * rows + (0 if plan.joint else pairs % J)
        return sort(jnp.moveaxis(x, 2, 1).reshape(B, G, T * rows, R), at)

    weights = jnp.ones(seen.shape) if plan.joint else weights
    columns = jnp.stack([more(of_heads(lse)), more(of_heads(d)), more(of_pairs(weights)),
                         more(of_pairs(seen))], axis=2)
    parts = max(1, min(8, BLOCKS // (B * G * N)))
    return gpu_kernels.by_chunk(
        plan, q, k, v, do, columns.reshape(B, G, 4, -1), more(pairs // J), first, parts)
