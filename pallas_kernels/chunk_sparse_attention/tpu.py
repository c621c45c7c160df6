"""Attention over chosen chunks on TPU: the Pallas Mosaic kernels of `tpu_kernels.py`."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import refuse_traced
from pallas_kernels.chunk_sparse_attention import tpu_kernels
from pallas_kernels.chunk_sparse_attention.tpu_kernels import Plan
from pallas_kernels.dispatch import target_kind, target_platform
from pallas_kernels.mosaic_tpu import LANES

_TILE = 128  # queries: whole lanes of slots, whatever their number
_SLACK = 16 * 2**20  # bytes of VMEM for what the compiler keeps there


def chunk_sparse_attention(q, k, v, indices, weights, index, *, chunk_size, scale, off_by_one):
    if target_platform() != "tpu":
        raise NotImplementedError(f"serves TPU only, the target is {target_platform()}")
    if index is not None:
        raise NotImplementedError("sees whole chunks, and takes no index")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"needs q, k, v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    refuse_traced(scale)
    rows = 8 * 4 // q.dtype.itemsize  # of a register
    if chunk_size % rows:
        raise NotImplementedError(f"needs chunk_size a multiple of {rows}, got {chunk_size}")
    (B, T, H, K), (S, G), J = q.shape, k.shape[1:3], indices.shape[-1]
    if J > LANES:
        raise NotImplementedError(f"needs at most {LANES} slots, got {J}")
    if S == 0:
        raise NotImplementedError("needs at least one chunk")
    R = H // G + -(H // G) % rows
    plan = Plan(_TILE, J, scale, off_by_one, weights is None, _vmem(S, R, K, v.shape[-1], q.dtype))

    heads = lambda x: jnp.pad(x, ((0, 0), (0, -T % _TILE), (0, 0), (0, R - H // G), (0, 0)))
    q = jnp.swapaxes(heads(q.reshape(B, T, G, H // G, K)), 1, 2)
    k, v = (jnp.moveaxis(x.reshape(B, -1, chunk_size, *x.shape[2:]), 3, 1) for x in (k, v))
    indices = _slots(indices, fill=-1)
    weights = None if weights is None else _slots(weights.astype(jnp.float32), fill=0)
    o = _attend(plan, q, k, v, indices, weights)
    return jnp.swapaxes(o, 1, 2)[:, :T, :, :H // G].reshape(B, T, H, -1)


def _slots(x, fill):
    """[B, T, G, J] -> [B, G, 1, T J], T filled up to whole tiles."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _TILE), (0, 0), (0, 0)), constant_values=fill)
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], 1, -1)


def _vmem(S, R, K, V, dtype):
    """Bytes of VMEM: keys, values, and their gradients, of a row, and two tiles of the others."""
    lanes = sum(math.ceil(width / LANES) * LANES for width in (K, V))
    row = S * lanes * (dtype.itemsize + 4)
    tiles = 2 * _TILE * R * 2 * lanes * dtype.itemsize
    needed, capacity = row + tiles + _SLACK, _capacity()
    if needed > capacity:
        raise NotImplementedError(
            f"keeps keys and values in VMEM: {S} of them need {needed >> 20} MiB "
            f"of {capacity >> 20}")
    return needed


def _capacity():
    """Bytes of VMEM that a kernel of the target may use."""
    return (56 if target_kind().startswith(("TPU7", "TPU v7")) else 112) * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, indices, weights):
    return tpu_kernels.forward(plan, q, k, v, _given(indices, weights))


def _attend_forward(plan, *arrays):
    return _attend(plan, *arrays), arrays


def _attend_backward(plan, arrays, do):
    q, k, v, indices, weights = arrays
    dq, dk, dv, *dweights = tpu_kernels.backward(plan, q, k, v, _given(indices, weights), do)
    if dweights:
        dweights = [dweights[0][..., :plan.J].reshape(weights.shape)]
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, *(dweights or [None])


_attend.defvjp(_attend_forward, _attend_backward)


def _given(*arrays):
    return [x for x in arrays if x is not None]
