"""The Pallas Mosaic TPU kernels of attention over chosen chunks, forward and backward.

The equations of `xla.py`. A grid step takes a tile of queries of one row and group of heads, a few
at a time, all R heads of their group at once. Keys and values lie side by side, and so do a strip
of a query's chunks, which makes products as wide and as deep as the matrix unit. Each operation
goes over all strips of the few queries, which fill each other's latencies. The group's keys and
values stay in VMEM for the whole row, so that a chosen chunk is an index into them. So do their
gradients: each strip adds to its chunks', in the order of the queries, which needs no sorting and
gives the same bits every time.
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
SLOTS = 64  # of the queries that are taken at a time
_ADDED = 32  # of those whose gradients are added at a time, if 128 lanes wide: more would spill
UNROLL = 2  # steps of the forward pass, which fill each other's latencies too


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built."""

    tile: int  # queries per grid step
    J: int  # slots of a query: whole strips
    strip: int  # slots of a query that lie side by side
    chunk_size: int
    K: int
    V: int
    scale: float
    off_by_one: bool
    joint: bool
    vmem: int  # bytes

    @property
    def together(self):
        """Queries that are taken at a time: a power of two."""
        return min(self.tile, _power_of_two(SLOTS // self.J))

    @property
    def added(self):
        """Queries whose gradients are added at a time, and slots of each."""
        limit = _ADDED * LANES // max(LANES, self.lanes)
        if self.J <= limit:
            return min(self.together, _power_of_two(limit // self.J)), self.J
        strips = range(1, max(1, limit // self.strip) + 1)
        return 1, self.strip * max(n for n in strips if self.strips % n == 0)

    @property
    def turns(self):
        """In which the gradients of the queries that go together are added."""
        queries, slots = self.added
        return self.together * self.J // (queries * slots)

    def queries(self, step):
        """Those of a step."""
        return [step * self.together + n for n in range(self.together)]

    @property
    def strips(self):
        """Of a query."""
        return self.J // self.strip

    @property
    def lanes(self):
        """Of a strip."""
        return self.strip * self.chunk_size

    @property
    def width(self):
        """Of keys and values."""
        return self.K + self.V

    @property
    def key_lanes(self):
        """Of the registers that hold the keys."""
        return min(self.width, self.K + -self.K % LANES)

    @property
    def first_value_lane(self):
        """Of the registers that hold the values."""
        return self.K - self.K % LANES

    @property
    def value_lanes(self):
        """Of these registers."""
        return self.width - self.first_value_lane


def _power_of_two(limit):
    return 1 << (max(1, limit).bit_length() - 1)


class _Slots:
    """The slots of a few queries, query by query: their chunks, and their weights (those of empty
    ones are 0). Lists are of strips, whose arrays are [R, lanes of a strip]."""

    def __init__(self, plan, queries, indices_ref, weights_ref, first=0, count=None):
        self.plan, self.queries, count = plan, queries, count or plan.J
        self.strips = count // plan.strip  # of a query
        at = [t * plan.J + first + j for t in queries for j in range(count)]
        indices = [indices_ref[0, 0, 0, i] for i in at]
        self.chunk = [jnp.maximum(i, 0) for i in indices]
        self.real = [jnp.where(i >= 0, 1.0, 0.0) for i in indices]
        weights = None if weights_ref is None else [weights_ref[0, 0, 0, i] for i in at]
        self.weight = weights or self.real

    def of_query(self, q_ref, do_ref=None):
        """For each strip q or, given do too, [2R, K + V]: q at its keys and do at its values."""
        xs = [q_ref[0, 0, t] for t in self.queries]
        if do_ref is not None:
            zeros = lambda x: jnp.zeros((x.shape[0], self.plan.width - x.shape[1]), x.dtype)
            do = [do_ref[0, 0, t] for t in self.queries]
            xs = [jnp.concatenate([_beside(q, zeros(q)), _beside(zeros(y), y)])
                  for q, y in zip(xs, do, strict=True)]
        return self._repeated(xs)

    def of_chunk(self, kv_ref, lanes=slice(None)):
        """A strip's chunks, one below the other: [lanes of a strip, K + V], or some of it."""
        strips = self.by_strip([kv_ref[0, 0, i, :, lanes] for i in self.chunk])
        return [jnp.concatenate(chunks) for chunks in strips]

    def keys(self, kv_ref):
        return self.of_chunk(kv_ref, slice(self.plan.key_lanes))

    def values(self, kv_ref):
        return self.of_chunk(kv_ref, slice(self.plan.first_value_lane, None))

    def places(self, ref, rows=slice(None), first=0):
        """For what one operation leaves for another."""
        first += unknown_zero()
        return [ref.at[first + n, rows] for n in range(len(self.chunk) // self.plan.strip)]

    def by_strip(self, xs):
        return [xs[n:n + self.plan.strip] for n in range(0, len(xs), self.plan.strip)]

    def by_query(self, xs):
        return [xs[n:n + self.strips] for n in range(0, len(xs), self.strips)]

    def largest(self, xs):
        """Of each slot's lanes or, if joint, of all lanes of a query, in those lanes."""
        if self.plan.joint:
            wide = [functools.reduce(jnp.maximum, x) for x in self.by_query(xs)]
            return self._repeated([jnp.max(x, axis=1, keepdims=True) for x in wide])
        own = self._own_lanes(xs[0].shape)
        return self.in_lanes(
            [jnp.max(jnp.where(lanes, x, -jnp.inf), axis=1, keepdims=True)
             for x in xs for lanes in own], xs[0].shape)

    def sums(self, ref, dtype):
        """Likewise, of all strips by one product, whose operands are rounded to `dtype`."""
        ones = [jnp.where(lanes, 1.0, 0.0) for lanes in self._own_lanes((1, self.plan.lanes))]
        if self.plan.joint:
            ones = [jnp.ones((1, self.plan.lanes))] * self.plan.strip
        ones = jnp.concatenate([jnp.broadcast_to(x, (self.plan.chunk_size, x.shape[1]))
                                for x in ones])
        x = ref[pl.ds(unknown_zero(), len(self.chunk) // self.plan.strip)]
        total = dot(x.reshape(-1, x.shape[2]).astype(dtype), ones.astype(dtype), NN)
        total = [total[n:n + x.shape[1]] for n in range(0, len(total), x.shape[1])]
        if self.plan.joint:
            total = self._repeated([functools.reduce(jnp.add, x) for x in self.by_query(total)])
        return total

    def in_lanes(self, xs, shape):
        """What is one per slot, in its lanes."""
        own, strips = self._own_lanes(shape), []
        for first, *rest in self.by_strip(xs):
            x = jnp.broadcast_to(first, shape)
            for lanes, other in zip(own[1:], rest, strict=True):
                x = jnp.where(lanes, other, x)
            strips.append(x)
        return strips

    def _own_lanes(self, shape):
        """For each slot of a strip, which lanes are its own."""
        lane, C = lax.broadcasted_iota(jnp.int32, shape, 1), self.plan.chunk_size
        return [(j * C <= lane) & (lane < (j + 1) * C) for j in range(self.plan.strip)]

    def _repeated(self, xs):
        return [x for x in xs for _ in range(self.strips)]


def _beside(*xs):
    return jnp.concatenate([x for x in xs if x.shape[1]], axis=1)


def _probabilities(plan, slots, logits, p_ref, dtype):
    """Leaves each strip's exponentials in `p_ref`; returns what makes probabilities of them: a
    softmax of each slot or, if joint, one of all slots of a query."""
    p = slots.places(p_ref)
    if plan.joint:
        for s, real in zip(logits, slots.in_lanes(slots.real, logits[0].shape), strict=True):
            s[...] += (1 - real) * _NEVER
    base = slots.largest([s[...] for s in logits])
    if plan.off_by_one:
        base = [jnp.maximum(b, 0) for b in base]
    for x, s, b in zip(p, logits, base, strict=True):
        x[...] = jnp.exp(s[...] - b)
    total = slots.sums(p_ref, dtype)
    if plan.off_by_one:
        total = [t + jnp.exp(-b) for t, b in zip(total, base, strict=True)]
    return [1 / t for t in total]


def _forward_kernel(plan, indices_ref, *refs):
    weights_ref, refs = (None, refs) if plan.joint else (refs[0], refs[1:])
    q_ref, kv_ref, o_ref, scratch = refs

    def queries(step, _):
        slots = _Slots(plan, plan.queries(step), indices_ref, weights_ref)
        logits, p = slots.places(scratch["logits"]), slots.places(scratch["p"])
        for s, q, k in zip(logits, slots.of_query(q_ref), slots.keys(kv_ref), strict=True):
            s[...] = plan.scale * dot(q, k, NT)
        factor = _probabilities(plan, slots, logits, scratch["p"], q_ref.dtype)
        weight = slots.in_lanes(slots.weight, p[0].shape)
        weighted = [(w * f * x[...]).astype(kv_ref.dtype)
                    for x, f, w in zip(p, factor, weight, strict=True)]
        _sum_of_products(slots, weighted, slots.values(kv_ref), o_ref)
        return 0

    lax.fori_loop(0, plan.tile // plan.together, queries, 0, unroll=UNROLL)


def _sum_of_products(slots, xs, chunks, out_ref):
    """Of each query's strips and chunks, as one product."""
    xs, chunks = slots.by_query(xs), slots.by_query(chunks)
    for t, x, y in zip(slots.queries, xs, chunks, strict=True):
        product = dot(jnp.concatenate(x, axis=1), jnp.concatenate(y), NN)
        out_ref[0, 0, t] = product.astype(out_ref.dtype)


def _backward_kernel(plan, indices_ref, *refs):
    weights_ref, refs = (None, refs) if plan.joint else (refs[0], refs[1:])
    q_ref, kv_ref, do_ref, dq_ref, dkv_ref, *dweights_ref, scratch = refs
    R = q_ref.shape[3]
    upper, lower = slice(R), slice(R, 2 * R)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dkv_ref[...] = jnp.zeros_like(dkv_ref)

    def queries(step, _):
        slots = _Slots(plan, plan.queries(step), indices_ref, weights_ref)
        logits, dp = (slots.places(scratch["products"], rows) for rows in (upper, lower))
        given, chunks = slots.of_query(q_ref, do_ref), slots.of_chunk(kv_ref)
        for s, y, x, kv in zip(logits, dp, given, chunks, strict=True):
            both = dot(x, kv, NT)
            s[...], y[...] = plan.scale * both[upper], both[lower]
        factor = _probabilities(plan, slots, logits, scratch["p"], q_ref.dtype)
        p = slots.places(scratch["p"])
        weight = slots.in_lanes(slots.weight, p[0].shape)
        ds, weighted = (slots.places(scratch["narrow"], rows) for rows in (upper, lower))
        for n, (x, f, w) in enumerate(zip(p, factor, weight, strict=True)):
            probability = f * x[...]
            logits[n][...] = probability * dp[n][...]
            x[...] = w * probability
            weighted[n][...] = x[...].astype(q_ref.dtype)
        d = slots.sums(scratch["products"].at[:, upper], q_ref.dtype)
        if not plan.joint:
            for t, x in zip(slots.queries, slots.by_query(d), strict=True):
                dweights_ref[0][0, 0, pl.ds(t, 1)] = _row(plan, x)
        for n, x in enumerate(p):
            ds[n][...] = (plan.scale * x[...] * (dp[n][...] - d[n])).astype(q_ref.dtype)
        _sum_of_products(slots, [x[...] for x in ds], slots.keys(kv_ref), dq_ref)
        lax.fori_loop(0, plan.turns, functools.partial(add, slots.queries[0]), 0)
        return 0

    few, count = plan.added
    parts = plan.J // count

    def add(first, turn, _):
        first += lax.div(turn, parts) * few
        slots = _Slots(plan, [first + n for n in range(few)], indices_ref, weights_ref,
                       first=lax.rem(turn, parts) * count, count=count)
        narrow = slots.places(scratch["narrow"], first=turn * (few * slots.strips))
        given, chunks = slots.of_query(q_ref, do_ref), slots.by_strip(slots.chunk)
        for x, y, strip in zip(narrow, given, chunks, strict=True):
            dkv = dot(x[...], y, TN)
            for j, i in enumerate(strip):
                dkv_ref[0, 0, i] += dkv[j * plan.chunk_size:(j + 1) * plan.chunk_size]
        return 0

    lax.fori_loop(0, plan.tile // plan.together, queries, 0)


def _row(plan, strips):
    """Sums over rows, of strip n in the n-th lane of each of its slots."""
    sums = [jnp.sum(x, axis=0, keepdims=True) for x in strips]
    lane = lax.broadcasted_iota(jnp.int32, sums[0].shape, 1)
    row = jnp.zeros_like(sums[0])
    for n, x in enumerate(sums):
        own = functools.reduce(jnp.logical_or, [
            lane == j * plan.chunk_size + n for j in range(plan.strip)])
        row = jnp.where(own, x, row)
    return row


def _specs(plan, q, kv):
    """Block specs by the kind of array; the grid is (rows, groups, tiles of queries)."""
    slots = pl.BlockSpec((1, 1, 1, plan.tile * plan.J), lambda b, g, t: (b, g, 0, t),
                         memory_space=pltpu.SMEM)
    query = lambda *shape: pl.BlockSpec(
        (1, 1, plan.tile, *shape), lambda b, g, t: (b, g, t) + (0,) * len(shape))
    chunks = pl.BlockSpec((1, 1, *kv.shape[2:]), lambda b, g, t: (b, g, 0, 0, 0),
                          pipeline_mode=pl.Buffered(1))
    R = q.shape[3]
    return dict(slots=slots, q=query(R, plan.key_lanes), kv=chunks,
                o=query(R, plan.value_lanes), dweights=query(plan.lanes))


def forward(plan, q, kv, slots):
    """Of q [B, G, T, R, key lanes], kv [B, G, N, C, K + V] and slots [B, G, 1, T J]:
    o [B, G, T, R, value lanes], whose last V are the outputs."""
    shapes = [jax.ShapeDtypeStruct((*q.shape[:4], plan.value_lanes), q.dtype)]
    inputs = ["slots"] * len(slots) + ["q", "kv"]
    return call(functools.partial(_forward_kernel, plan), "chunk_sparse_attention_forward",
                _specs(plan, q, kv), inputs, ["o"], [*slots, q, kv], shapes, _grid(plan, q),
                _scratch(plan, q, logits=(1, jnp.float32), p=(1, jnp.float32)),
                vmem_limit_bytes=plan.vmem)[0]


def backward(plan, q, kv, slots, do):
    """dq, whose first K are q's gradient, dkv in f32, and unless joint dweights [B, G, T, lanes of
    a strip]: those of a query's n-th strip in the n-th lane of each slot."""
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(kv.shape, jnp.float32)]
    outputs = ["q", "kv"]
    if not plan.joint:
        shapes.append(jax.ShapeDtypeStruct((*q.shape[:3], plan.lanes), jnp.float32))
        outputs.append("dweights")
    inputs = ["slots"] * len(slots) + ["q", "kv", "o"]
    return call(functools.partial(_backward_kernel, plan), "chunk_sparse_attention_backward",
                _specs(plan, q, kv), inputs, outputs, [*slots, q, kv, do], shapes, _grid(plan, q),
                _scratch(plan, q, products=(2, jnp.float32), p=(1, jnp.float32),
                         narrow=(2, q.dtype)),
                vmem_limit_bytes=plan.vmem)


def _scratch(plan, q, **kinds):
    """[n R, lanes] for each strip of the queries that go together, by name: n and dtype."""
    strips, R = plan.together * plan.strips, q.shape[3]
    return [{name: pltpu.VMEM((strips, n * R, plan.lanes), dtype)
             for name, (n, dtype) in kinds.items()}]


def _grid(plan, q):
    B, G, T = q.shape[:3]
    return B, G, T // plan.tile
