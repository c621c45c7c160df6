"""The Pallas Mosaic TPU kernels of attention over chosen chunks, forward and backward.

The equations of `xla.py`. A grid step takes a tile of queries of one row and group of heads, a few
at a time, all R heads of their group at once: each operation for all slots of the few, which fill
each other's latencies, since the compiler hardly reorders over long distances. The group's keys and
values stay in VMEM for the whole row, so that a chosen chunk is an index into them. So do dk and dv
in the backward pass: each pair adds to its chunk's, in the order of the queries, which needs no
sorting and gives the same bits every time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import LANES, NN, NT, TN, call, dot, unknown_zero

_NEVER = -1e30  # added to logits of empty slots
_SLOTS = 32  # of the queries that are taken at a time


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
        """Queries that are taken at a time: a power of two."""
        return min(self.tile, 1 << (max(1, _SLOTS // self.J).bit_length() - 1))


class _Slots:
    """The slots of a few queries, query by query: chunk, whether there is one (as a number), and
    weight (0 if not)."""

    def __init__(self, plan, step, indices_ref, weights_ref):
        self.queries = [step * plan.together + n for n in range(plan.together)]
        self.J = plan.J
        at = [t * plan.J + j for t in self.queries for j in range(plan.J)]
        indices = [indices_ref[0, 0, 0, i] for i in at]
        self.chunk = [jnp.maximum(i, 0) for i in indices]
        self.real = [jnp.where(i >= 0, 1.0, 0.0) for i in indices]
        weights = None if weights_ref is None else [weights_ref[0, 0, 0, i] for i in at]
        self.weight = weights or self.real

    def of_query(self, ref):
        """What is one per query, for each slot."""
        return self._repeated([ref[0, 0, t] for t in self.queries])

    def of_chunk(self, ref):
        return [ref[0, 0, i] for i in self.chunk]

    def of_slot(self, ref):
        """Places for what one operation leaves for another."""
        return [ref.at[unknown_zero() + n] for n in range(len(self.chunk))]

    def over_query(self, f, xs):
        """For each slot, of all slots of its query."""
        return self._repeated(self.reduce(f, xs))

    def reduce(self, f, xs):
        return [functools.reduce(f, xs[n:n + self.J]) for n in range(0, len(xs), self.J)]

    def _repeated(self, xs):
        return [x for x in xs for _ in range(self.J)]


def _exponentials(plan, slots, q, k_ref, scratch):
    """Those of each slot's logits, in `scratch`, and what makes probabilities [R, C] of them: a
    softmax of each slot or, if joint, one of all slots of a query."""
    logits, p = slots.of_slot(scratch["logits"]), slots.of_slot(scratch["p"])
    for s, x, k, r in zip(logits, q, slots.of_chunk(k_ref), slots.real, strict=True):
        s[...] = plan.scale * dot(x, k, NT) + (1 - r) * _NEVER
    over = slots.over_query if plan.joint else lambda f, xs: xs
    base = over(jnp.maximum, [jnp.max(s[...], axis=1, keepdims=True) for s in logits])
    if plan.off_by_one:
        base = [jnp.maximum(b, 0) for b in base]
    for x, s, b, r in zip(p, logits, base, slots.real, strict=True):
        x[...] = r * jnp.exp(s[...] - b)
    total = over(jnp.add, [jnp.sum(x[...], axis=1, keepdims=True) for x in p])
    if plan.off_by_one:
        total = [t + jnp.exp(-b) for t, b in zip(total, base, strict=True)]
    return p, [1 / jnp.where(t == 0, 1, t) for t in total]


def _forward_kernel(plan, indices_ref, *refs):
    weights_ref, refs = (None, refs) if plan.joint else (refs[0], refs[1:])
    q_ref, k_ref, v_ref, o_ref, scratch = refs

    def queries(step, _):
        slots = _Slots(plan, step, indices_ref, weights_ref)
        p, factor = _exponentials(plan, slots, slots.of_query(q_ref), k_ref, scratch)
        o = [dot((w * f * x[...]).astype(v_ref.dtype), v, NN)
             for x, f, w, v in zip(p, factor, slots.weight, slots.of_chunk(v_ref), strict=True)]
        for t, x in zip(slots.queries, slots.reduce(jnp.add, o), strict=True):
            o_ref[0, 0, t] = x.astype(o_ref.dtype)
        return 0

    lax.fori_loop(0, plan.tile // plan.together, queries, 0)


def _backward_kernel(plan, indices_ref, *refs):
    weights_ref, refs = (None, refs) if plan.joint else (refs[0], refs[1:])
    q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *dweights_ref, scratch = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def queries(step, _):
        slots = _Slots(plan, step, indices_ref, weights_ref)
        q, do = slots.of_query(q_ref), slots.of_query(do_ref)
        dp, ds, weighted = (slots.of_slot(scratch[name]) for name in ("dp", "ds", "weighted"))
        for ref, x, v in zip(dp, do, slots.of_chunk(v_ref), strict=True):
            ref[...] = dot(x, v, NT)
        p, factor = _exponentials(plan, slots, q, k_ref, scratch)
        d = [f * jnp.sum(x[...] * y[...], axis=1, keepdims=True)
             for x, y, f in zip(p, dp, factor, strict=True)]
        if plan.joint:
            d = slots.over_query(jnp.add, d)
        else:
            for n, t in enumerate(slots.queries):
                dweights_ref[0][0, 0, pl.ds(t, 1)] = _row(d[n * plan.J:(n + 1) * plan.J])
        for n, (x, f, w) in enumerate(zip(p, factor, slots.weight, strict=True)):
            x = w * f * x[...]
            weighted[n][...] = x.astype(do_ref.dtype)
            ds[n][...] = (plan.scale * x * (dp[n][...] - d[n])).astype(q_ref.dtype)
        dq = [dot(x[...], k, NN) for x, k in zip(ds, slots.of_chunk(k_ref), strict=True)]
        for t, x in zip(slots.queries, slots.reduce(jnp.add, dq), strict=True):
            dq_ref[0, 0, t] = x.astype(dq_ref.dtype)
        for n, i in enumerate(slots.chunk):
            dk_ref[0, 0, i] += dot(ds[n][...], q[n], TN)
            dv_ref[0, 0, i] += dot(weighted[n][...], do[n], TN)
        return 0

    lax.fori_loop(0, plan.tile // plan.together, queries, 0)


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
                [_scratch(plan, q, k, logits=jnp.float32, p=jnp.float32)],
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
                _grid(plan, q),
                [_scratch(plan, q, k, logits=jnp.float32, p=jnp.float32, dp=jnp.float32,
                          ds=q.dtype, weighted=do.dtype)],
                vmem_limit_bytes=plan.vmem)


def _scratch(plan, q, k, **dtypes):
    """[R, C] for each slot of the queries that go together, by name."""
    shape = plan.together * plan.J, q.shape[3], k.shape[3]
    return {name: pltpu.VMEM(shape, dtype) for name, dtype in dtypes.items()}


def _grid(plan, q):
    B, G, T = q.shape[:3]
    return B, G, T // plan.tile
