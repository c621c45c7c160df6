"""Attention over chosen chunks on TPU: the Pallas Mosaic kernels of `tpu_kernels.py`."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import refuse_traced
from pallas_kernels.chunk_sparse_attention import tpu_kernels
from pallas_kernels.chunk_sparse_attention.tpu_kernels import Plan
from pallas_kernels.dispatch import target_kind, target_platform
from pallas_kernels.mosaic_tpu import LANES

_TILE = 128  # queries: whole lanes of slots, whatever their number
_V7 = ("TPU7", "TPU v7")
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
    strip = strip_of(J, chunk_size, _matrix_width())
    J += -J % strip
    if J > (most := min(LANES, strip * chunk_size)):
        raise NotImplementedError(f"needs at most {most} slots, got {J}")
    if S == 0:
        raise NotImplementedError("needs at least one chunk")
    R = H // G + -(H // G) % rows
    V = v.shape[-1]
    vmem = _vmem(S, R, K, V, max(tpu_kernels.SLOTS, J) * chunk_size, q.dtype)
    plan = Plan(_TILE, J, strip, chunk_size, K, V, scale, off_by_one, weights is None, vmem)

    heads = lambda x: jnp.pad(x, ((0, 0), (0, -T % _TILE), (0, 0), (0, R - H // G), (0, 0)))
    q = jnp.swapaxes(heads(q.reshape(B, T, G, H // G, K)), 1, 2)
    kv = jnp.concatenate([k, v], axis=-1).reshape(B, -1, chunk_size, G, K + V)
    indices = _slots(indices, J, fill=-1)
    weights = None if weights is None else _slots(weights.astype(jnp.float32), J, fill=0)
    o = _attend(plan, q, jnp.moveaxis(kv, 3, 1), indices, weights)
    return jnp.swapaxes(o, 1, 2)[:, :T, :, :H // G].reshape(B, T, H, -1)


def strip_of(J, chunk_size, matrix_width):
    """Slots of a query that lie side by side."""
    return max(1, min(J, matrix_width // chunk_size))


def _slots(x, J, fill):
    """[B, T, G, <= J] -> [B, G, 1, T J], T filled up to whole tiles."""
    padding = (0, 0), (0, -x.shape[1] % _TILE), (0, 0), (0, J - x.shape[-1])
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], 1, -1)


def _vmem(S, R, K, V, attended, dtype):
    """Bytes of VMEM: keys and values of a row, their gradients, two tiles of the others, and what
    the queries that go together attend to."""
    lanes = lambda width: width + -width % LANES
    row = S * lanes(K + V) * (dtype.itemsize + 4)
    tiles = 2 * _TILE * R * 2 * (lanes(K) + lanes(V)) * dtype.itemsize
    scratch = R * attended * (3 * 4 + 2 * dtype.itemsize)
    needed, capacity = row + tiles + scratch + _SLACK, _capacity()
    if needed > capacity:
        raise NotImplementedError(
            f"keeps keys and values in VMEM: {S} of them need {needed >> 20} MiB "
            f"of {capacity >> 20}")
    return needed


def _capacity():
    """Bytes of VMEM that a kernel of the target may use."""
    return (56 if target_kind().startswith(_V7) else 112) * 2**20


def _matrix_width():
    """Rows and columns of the target's matrix unit."""
    return 256 if target_kind().startswith(("TPU v6", *_V7)) else 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, kv, indices, weights):
    o = tpu_kernels.forward(plan, _at_keys(plan, q), kv, _given(indices, weights))
    return o[..., plan.K - plan.first_value_lane:]


def _attend_forward(plan, *arrays):
    return _attend(plan, *arrays), arrays


def _attend_backward(plan, arrays, do):
    q, kv, indices, weights = arrays
    dq, dkv, *dweights = tpu_kernels.backward(
        plan, _at_keys(plan, q), kv, _given(indices, weights), _at_values(plan, do))
    if dweights:
        x = dweights[0].reshape(*dweights[0].shape[:3], plan.strip, plan.chunk_size)
        x = jnp.swapaxes(x[..., :plan.strips], -1, -2)
        dweights = [x.reshape(weights.shape)]
    return dq[..., :plan.K], dkv.astype(kv.dtype), None, *(dweights or [None])


_attend.defvjp(_attend_forward, _attend_backward)


def _at_keys(plan, x):
    """In the lanes of the registers that hold the keys, zeros beside it: values do not count."""
    return jnp.pad(x, [(0, 0)] * 4 + [(0, plan.key_lanes - plan.K)])


def _at_values(plan, x):
    return jnp.pad(x, [(0, 0)] * 4 + [(plan.K - plan.first_value_lane, 0)])


def _given(*arrays):
    return [x for x in arrays if x is not None]
