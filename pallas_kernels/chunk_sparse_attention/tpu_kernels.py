"""The Pallas Mosaic TPU kernels of attention over chosen chunks, forward and backward.

The equations of `xla.py`. A grid step takes a tile of queries of one row and group of heads, one
query after the other, all R heads of its group at once. The group's keys and values stay in VMEM
for the whole row, so that a chosen chunk is an index into them. So do dk and dv in the backward
pass: each pair adds to its chunk's, in the order of the queries, which needs no sorting and gives
the same bits every time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import LANES, NN, NT, TN, call, dot

_NEVER = -1e30  # added to logits of empty slots


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built."""

    tile: int  # queries per grid step
    J: int
    scale: float
    off_by_one: bool
    joint: bool
    vmem: int  # bytes

    @property
    def together(self):
        """Queries of the forward pass that fill each other's latencies: about 32 slots."""
        return min(self.tile, 1 << (max(1, 32 // self.J).bit_length() - 1))


class _Slots:
    """The slots of one query: chunk, whether there is one (as a number), and weight (0 if not)."""

    def __init__(self, plan, t, indices_ref, weights_ref):
        at = [t * plan.J + j for j in range(plan.J)]
        indices = [indices_ref[0, 0, 0, i] for i in at]
        self.chunk = [jnp.maximum(i, 0) for i in indices]
        self.real = [jnp.where(i >= 0, 1.0, 0.0) for i in indices]
        weights = None if weights_ref is None else [weights_ref[0, 0, 0, i] for i in at]
        self.weight = weights or self.real


def _probabilities(plan, logits, real):
    """Softmaxes of each slot's logits [R, C] or, if joint, one of all slots'."""
    if not plan.joint:
        return [_softmax(plan, [s], [r])[0] for s, r in zip(logits, real, strict=True)]
    return _softmax(plan, logits, real)


def _softmax(plan, logits, real):
    logits = [s + (1 - r) * _NEVER for s, r in zip(logits, real, strict=True)]
    base = functools.reduce(jnp.maximum, [jnp.max(s, axis=1, keepdims=True) for s in logits])
    if plan.off_by_one:
        base = jnp.maximum(base, 0)
    p = [r * jnp.exp(s - base) for s, r in zip(logits, real, strict=True)]
    total = functools.reduce(jnp.add, [jnp.sum(x, axis=1, keepdims=True) for x in p])
    if plan.off_by_one:
        total += jnp.exp(-base)
    inverse = 1 / jnp.where(total == 0, 1, total)
    return [x * inverse for x in p]


def _forward_kernel(plan, indices_ref, *refs):
    weights_ref, refs = (None, refs) if plan.joint else (refs[0], refs[1:])
    q_ref, k_ref, v_ref, o_ref = refs

    def query(t):
        slots, q = _Slots(plan, t, indices_ref, weights_ref), q_ref[0, 0, t]
        logits = [plan.scale * dot(q, k_ref[0, 0, i], NT) for i in slots.chunk]
        o = jnp.zeros(o_ref.shape[3:], jnp.float32)
        p = _probabilities(plan, logits, slots.real)
        for x, w, i in zip(p, slots.weight, slots.chunk, strict=True):
            o += dot((w * x).astype(v_ref.dtype), v_ref[0, 0, i], NN)
        o_ref[0, 0, t] = o.astype(o_ref.dtype)

    def queries(i, _):
        for n in range(plan.together):
            query(i * plan.together + n)
        return 0

    lax.fori_loop(0, plan.tile // plan.together, queries, 0)


def _backward_kernel(plan, indices_ref, *refs):
    weights_ref, refs = (None, refs) if plan.joint else (refs[0], refs[1:])
    q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *dweights_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def query(t, _):
        slots = _Slots(plan, t, indices_ref, weights_ref)
        q, do = q_ref[0, 0, t], do_ref[0, 0, t]
        logits = [plan.scale * dot(q, k_ref[0, 0, i], NT) for i in slots.chunk]
        p = _probabilities(plan, logits, slots.real)
        dp = [dot(do, v_ref[0, 0, i], NT) for i in slots.chunk]
        d = [jnp.sum(x * y, axis=1, keepdims=True) for x, y in zip(p, dp, strict=True)]
        if plan.joint:
            d = [functools.reduce(jnp.add, d)] * plan.J
        else:
            dweights_ref[0][0, 0, pl.ds(t, 1)] = _row(d)
        dq = jnp.zeros(dq_ref.shape[3:], jnp.float32)
        for j, i in enumerate(slots.chunk):
            weighted = slots.weight[j] * p[j]
            ds = (plan.scale * weighted * (dp[j] - d[j])).astype(q.dtype)
            dq += dot(ds, k_ref[0, 0, i], NN)
            dk_ref[0, 0, i] += dot(ds, q, TN)
            dv_ref[0, 0, i] += dot(weighted.astype(do.dtype), do, TN)
        dq_ref[0, 0, t] = dq.astype(dq_ref.dtype)
        return 0

    lax.fori_loop(0, plan.tile, query, 0)


def _row(columns):
    """Sums of columns [R, 1], side by side in the lanes of a row."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = jnp.zeros((1, LANES), jnp.float32)
    for j, column in enumerate(columns):
        row = jnp.where(lane == j, jnp.sum(column, axis=0, keepdims=True), row)
    return row


def _specs(plan, q, k, v):
    """Block specs by the kind of array; the grid is (rows, groups, tiles of queries)."""
    R, once = q.shape[3], pl.Buffered(1)
    slots = pl.BlockSpec((1, 1, 1, plan.tile * plan.J), lambda b, g, t: (b, g, 0, t),
                         memory_space=pltpu.SMEM)
    query = lambda width: pl.BlockSpec((1, 1, plan.tile, R, width), lambda b, g, t: (b, g, t, 0, 0))
    chunks = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, g, t: (b, g, 0, 0, 0),
                                    pipeline_mode=once)
    return dict(slots=slots, K=query(q.shape[-1]), V=query(v.shape[-1]), k=chunks(k), v=chunks(v),
                dweights=pl.BlockSpec((1, 1, plan.tile, LANES), lambda b, g, t: (b, g, t, 0)))


def forward(plan, q, k, v, slots):
    """Of q [B, G, T, R, K], k, v [B, G, N, C, ...] and slots [B, G, 1, T J]: o [B, G, T, R, V]."""
    shapes = [jax.ShapeDtypeStruct((*q.shape[:4], v.shape[-1]), v.dtype)]
    inputs = ["slots"] * len(slots) + ["K", "k", "v"]
    return call(functools.partial(_forward_kernel, plan), "chunk_sparse_attention_forward",
                _specs(plan, q, k, v), inputs, ["V"], [*slots, q, k, v], shapes, _grid(plan, q),
                vmem_limit_bytes=plan.vmem)[0]


def backward(plan, q, k, v, slots, do):
    """dq, dk and dv in f32, and unless joint dweights [B, G, T, 128], the slots' the first."""
    wide = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    shapes, outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), wide(k), wide(v)], ["K", "k", "v"]
    if not plan.joint:
        shapes.append(jax.ShapeDtypeStruct((*q.shape[:3], LANES), jnp.float32))
        outputs.append("dweights")
    inputs = ["slots"] * len(slots) + ["K", "k", "v", "V"]
    return call(functools.partial(_backward_kernel, plan), "chunk_sparse_attention_backward",
                _specs(plan, q, k, v), inputs, outputs, [*slots, q, k, v, do], shapes,
                _grid(plan, q), vmem_limit_bytes=plan.vmem)


def _grid(plan, q):
    B, G, T = q.shape[:3]
    return B, G, T // plan.tile
