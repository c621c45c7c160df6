"""The Pallas Mosaic TPU kernels of linear attention by chunks, forward and backward.

The equations of `xla.py`, with S the state that enters a chunk and D the decay from token to token
within it, times `scale` (as are the weights `read`):

    P = (Q K^T) . D        O = P V + read . (Q S)        S' = keep S + K^T (write . V)

and, for gradients dO of the outputs and dS' of the state that leaves, with E = (dO V^T) . D,

    dQ = E K + read . (dO S^T)        dK = E^T Q + write . (V dS'^T)
    dV = P^T dO + write . (K dS')     dS = keep dS' + Q^T (read . dO)

A grid step takes several chunks of several heads: their matrix products are independent but for
the states, and fill each other's latencies. What one product leaves for another waits in VMEM, so
that registers suffice; what needs no state is done one chunk ahead; both terms of a gradient are
one product, as deep as two, of factors that have the weights in them. The forward pass of a
gradient keeps the state that enters each grid step; the backward pass recomputes those in between.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_chunks import Chunk, Weights
from pallas_kernels.mosaic_tpu import LANES, NN, NT, VMEM, call, dot, strictly_lower, sum_columns


@dataclasses.dataclass(frozen=True)
class Plan(Weights):
    """What is known when the kernels are built."""

    heads: int  # per grid step
    chunk: int  # tokens per chunk
    chunks: int  # per grid step
    scale: float
    token_decay: bool
    packed: bool
    exact: bool  # float32: differences of running decays need what rounding took from them

    @property
    def _groups(self):
        total = ["total"] * self.token_decay + ["rest"] * (self.token_decay and self.exact)
        return ("read", "write", "keep", *total, "first")

    @property
    def weights(self):
        """The number of arrays of weights."""
        return 1 if self.token_decay else 2


class _Chunk(Chunk):
    """With the decays from token to token."""

    def __init__(self, plan, index, rows_ref, intra_ref, keys_ref, scratch):
        super().__init__(plan, index, rows_ref, scratch)
        self.intra_ref, self.keys_ref = intra_ref, keys_ref

    def prepare(self, names):
        """The columns of the weights in `names`, and the decays from token to token."""
        plan = self.plan
        if plan.token_decay:
            names += ("total", "rest") if plan.exact else ("total",)
        for head in range(plan.heads):
            for name in names:
                self.make_column(name, head)
        if plan.packed:
            self.make_column("first")
        if plan.token_decay or plan.packed:
            first = self.column("first", 0, plan.chunk) if plan.packed else 0
            shown, hidden = (0.0, -jnp.inf) if plan.token_decay else (1.0, 0.0)
            self.scratch["visible"][...] = jnp.where(self.keys_ref[...] >= first, shown, hidden)
            for head in range(plan.heads):
                self.scratch["decay"][head] = self.visible_decay(head)

    def visible_decay(self, head):
        """The decays from token to token, of those that the query may see."""
        visible = self.scratch["visible"][...]
        if self.plan.token_decay:
            return self.plan.scale * jnp.exp(self.log_decay(head) + visible)
        return self.intra_ref[head] * visible

    def intra(self, head):
        """The decays from token to token."""
        kept = "decay" in self.scratch
        return self.scratch["decay"][head] if kept else self.intra_ref[head]


def _keys(C):
    """The numbers of the keys that a query may see, -1 for others: [C, C]."""
    i, j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return jnp.where(j <= i, j, -1).astype(jnp.float32)


def _chunks_of_step(plan, weights_refs, keys_ref, scratch):
    rows_ref, *intra_ref = weights_refs
    return [_Chunk(plan, index, rows_ref, *(intra_ref or [None]), keys_ref, scratch)
            for index in range(plan.chunks)]


def _one_ahead(first, second, chunks):
    """`first` and `second` of each chunk; `first` of the next one comes before `second`."""
    first(chunks[0])
    for chunk, later in itertools.zip_longest(chunks, chunks[1:]):
        if later is not None:
            first(later)
        second(chunk)


def _forward_kernel(plan, K, V, keep_states, *refs):
    weights_refs, refs = refs[:plan.weights], refs[plan.weights:]
    q_ref, k_ref, v_ref, initial_ref, o_ref, state_ref, *states_ref, keys_ref, scratch = refs
    narrow = lambda x: x.astype(q_ref.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]
        keys_ref[...] = _keys(plan.chunk)

    if keep_states:
        states_ref[0][0] = state_ref[...]

    def first(chunk):
        chunk.prepare(("read",))
        for head in range(plan.heads):
            at = chunk.at(head, K)
            chunk.scratch["scores"][head] = dot(q_ref[at], k_ref[at], NT)
            chunk.scratch["k"][head] = k_ref[chunk.at(head, K, chunk.again)].T

    def second(chunk):
        scores, k, p, own, written = (
            chunk.scratch[name] for name in ("scores", "k", "p", "own", "written"))
        for head in range(plan.heads):
            v = v_ref[chunk.at(head, V)]
            p[head] = narrow(scores[head] * chunk.intra(head))
            written[head] = dot(narrow(k[head] * chunk.row("write", head)), v, NN)
            own[head] = dot(p[head], v, NN)
        for head in range(plan.heads):
            read = dot(q_ref[chunk.at(head, K)], narrow(state_ref[0, head]), NN)
            o = own[head] + chunk.column("read", head, V) * read
            o_ref[chunk.at(head, V)] = o.astype(o_ref.dtype)
            state_ref[0, head] = chunk.keep(head) * state_ref[0, head] + written[head]

    _one_ahead(first, second, _chunks_of_step(plan, weights_refs, keys_ref, scratch))


def _backward_kernel(plan, K, V, decay_gradient, *refs):
    weights_refs, refs = refs[:plan.weights], refs[plan.weights:]
    (q_ref, k_ref, v_ref, do_ref, dlast_ref, states_ref,
     dq_ref, dk_ref, dv_ref, dstate_ref, *passed_ref, keys_ref, scratch) = refs
    narrow = lambda x: x.astype(q_ref.dtype)
    chunks = _chunks_of_step(plan, weights_refs, keys_ref, scratch)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for head in range(plan.heads):
            dstate_ref[0, head] = dlast_ref[0, head]
            chunks[-1].scratch["dafter"][head] = narrow(dlast_ref[0, head])
        keys_ref[...] = _keys(plan.chunk)

    chunks[0].scratch["state"][...] = states_ref[0, 0]
    for chunk, after in itertools.zip_longest(chunks, chunks[1:]):
        k = chunk.scratch["k"]
        for head in range(plan.heads):
            k[head] = k_ref[chunk.at(head, K)].T
        for head in range(plan.heads if after else 0):
            k_write = narrow(k[head] * chunk.row("write", head))
            after.scratch["state"][head] = dot(k_write, v_ref[chunk.at(head, V)], NN)
    for chunk, after in itertools.pairwise(chunks):
        for head in range(plan.heads):
            after.scratch["state"][head] += chunk.keep(head) * chunk.scratch["state"][head]

    def first(chunk):
        chunk.prepare(("read", "write"))
        for head in range(plan.heads):
            at_k, at_v = chunk.at(head, K), chunk.at(head, V)
            chunk.scratch["scores"][head] = dot(q_ref[at_k], k_ref[at_k], NT)
            chunk.scratch["e"][head] = dot(do_ref[at_v], v_ref[at_v], NT)
            chunk.scratch["q"][head] = q_ref[chunk.at(head, K, chunk.again)].T
            if not decay_gradient:
                k_write = narrow(chunk.scratch["k"][head] * chunk.row("write", head))
                chunk.scratch["k_write"][head] = k_write.T

    def passed(name, chunk, head):
        """What a decay's gradient is made of, as a row: see `decay_gradient` of `chunks.py`."""
        at = ("within", "written", "through").index(name) * plan.heads + head
        return passed_ref[0].at[0, chunk.index, 0, at:at + 1]

    def own(chunk, head):
        """What needs no gradient of a state."""
        at_k, at_v = chunk.at(head, K), chunk.at(head, V)
        scores, e, q, k, p, narrow_e, e_transposed, state = (
            chunk.scratch[name].at[head]
            for name in ("scores", "e", "q", "k", "p", "narrow_e", "e_transposed", "state"))
        p[...] = narrow(scores[...] * chunk.intra(head)).T
        narrow_e[...] = narrow(e[...] * chunk.intra(head))
        e_transposed[...] = narrow_e[...].T
        do_read = narrow(chunk.column("read", head, V) * do_ref[at_v])
        dq = dot(_beside(narrow_e[...], do_read), _beside(k[...], narrow(state[...])), NT)
        dq_ref[at_k] = dq.astype(dq_ref.dtype)
        if decay_gradient:
            # What a token gives to itself would cancel but for rounding.
            pairs = strictly_lower(scores[...] * (e[...] * chunk.intra(head)))
            reads = q[...] * dot(narrow(state[...]), do_ref[at_v], NT)
            passed("within", chunk, head)[...] = (
                sum_columns(pairs.T - pairs) + chunk.row("read", head) * sum_columns(reads))

    def second(chunk):
        q, k, k_write, p, e_transposed, state, dstate, dafter = (
            chunk.scratch[name] for name in (
                "q", "k", "k_write", "p", "e_transposed", "state", "dstate", "dafter"))
        for head in range(plan.heads):
            own(chunk, head)
        for head in range(plan.heads):
            q_read = narrow(q[head] * chunk.row("read", head))
            dstate[head] = dot(q_read, do_ref[chunk.at(head, V)], NN)
        for head in range(plan.heads):
            at_k, at_v = chunk.at(head, K), chunk.at(head, V)
            if decay_gradient:  # whose transposes leave no room for more
                k_write[head] = narrow(chunk.column("write", head, K) * k_ref[at_k])
            dv = dot(_beside(p[head], k_write[head]),
                     jnp.concatenate([do_ref[at_v], dafter[head]]), NN)
            dv_ref[at_v] = dv.astype(dv_ref.dtype)
            v_write = narrow(chunk.column("write", head, V) * v_ref[at_v])
            dk = dot(_beside(e_transposed[head], v_write), _beside(q[head], dafter[head]), NT)
            dk_ref[at_k] = dk.astype(dk_ref.dtype)
            if decay_gradient:
                written = sum_columns(k[head] * dot(dafter[head], v_ref[at_v], NT))
                passed("written", chunk, head)[...] = chunk.row("write", head) * written
            dkept = chunk.keep(head) * dstate_ref[0, head]
            dbefore = dkept + dstate[head]
            dstate_ref[0, head] = dbefore
            # Of the chunk before, which may be the last one of the next grid step.
            chunks[chunk.index - 1].scratch["dafter"][head] = narrow(dbefore)
            if decay_gradient:
                through = sum_columns(sum_columns(state[head] * dkept).T)
                passed("through", chunk, head)[...] = jnp.broadcast_to(through, (1, plan.chunk))

    _one_ahead(first, second, chunks[::-1])


def _beside(*arrays):
    return jnp.concatenate(arrays, axis=1)


def _specs(plan, B, T, H, K, V, weights, block_of):
    """Block specs by the kind of array; the grid is (groups of heads, rows, blocks of tokens)."""
    rows, intra = weights
    row = lambda b: b if rows.shape[0] > 1 else 0
    heads, C = plan.heads, plan.chunk
    at = lambda width: pl.BlockSpec((1, plan.block, heads * width),
                                    lambda h, b, n: (b, block_of(n), h))
    specs = dict(
        rows=pl.BlockSpec((1, plan.chunks, 1, plan.rows, C),
                          lambda h, b, n: (row(b), block_of(n), h, 0, 0)),
        intra=pl.BlockSpec((heads, C, C), lambda h, b, n: (h, 0, 0)),
        K=at(K), V=at(V),
        state=pl.BlockSpec((1, heads, K, V), lambda h, b, n: (b, h, 0, 0)),
        states=pl.BlockSpec((1, 1, heads, K, V), lambda h, b, n: (b, block_of(n), h, 0, 0)),
        passed=pl.BlockSpec((1, plan.chunks, 1, 3 * heads, C),
                            lambda h, b, n: (b, block_of(n), h, 0, 0)),
    )
    return specs, ["rows"] if intra is None else ["rows", "intra"]


def forward(plan, q, k, v, initial_state, weights, keep_states):
    B, T, _ = q.shape
    _, H, K, V = initial_state.shape
    blocks = T // plan.block
    specs, inputs = _specs(plan, B, T, H, K, V, weights, lambda n: n)
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype),
              jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)]
    outputs = ["V", "state"]
    if keep_states:
        shapes.append(jax.ShapeDtypeStruct((B, blocks, H, K, V), jnp.float32))
        outputs.append("states")
    C = plan.chunk
    kernel = functools.partial(_forward_kernel, plan, K, V, keep_states)
    return call(
        kernel, "linear_attention_forward", specs,
        inputs + ["K", "K", "V", "state"], outputs,
        [x for x in weights if x is not None] + [q, k, v, initial_state], shapes,
        (H // plan.heads, B, blocks), _scratch(
            plan, scores=(C, C), k=(K, C, q.dtype), p=(C, C, q.dtype), own=(C, V),
            written=(K, V)), vmem_limit_bytes=VMEM)


def backward(plan, q, k, v, do, dstate, states, weights, decay_gradient):
    B, T, _ = q.shape
    _, H, K, V = dstate.shape
    blocks = T // plan.block
    specs, inputs = _specs(plan, B, T, H, K, V, weights, lambda n: blocks - 1 - n)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, dstate)]
    outputs = ["K", "K", "V", "state"]
    if decay_gradient:
        shapes.append(jax.ShapeDtypeStruct(
            (B, T // plan.chunk, H // plan.heads, 3 * plan.heads, plan.chunk), jnp.float32))
        outputs.append("passed")
    C = plan.chunk
    kernel = functools.partial(_backward_kernel, plan, K, V, decay_gradient)
    return call(
        kernel, "linear_attention_backward", specs,
        inputs + ["K", "K", "V", "V", "state", "states"], outputs,
        [x for x in weights if x is not None] + [q, k, v, do, dstate, states], shapes,
        (H // plan.heads, B, blocks), _scratch(
            plan, state=(K, V), q=(K, C, q.dtype), k=(K, C, q.dtype), scores=(C, C), e=(C, C),
            p=(C, C, q.dtype), narrow_e=(C, C, q.dtype), e_transposed=(C, C, q.dtype),
            k_write=(C, K, q.dtype), dstate=(K, V), dafter=(K, V, q.dtype)),
        vmem_limit_bytes=VMEM)


def _scratch(plan, **per_head):
    """The numbers of the keys, and what is kept of each chunk: shapes and types by name."""
    C = plan.chunk
    keep = lambda rows, columns, dtype=jnp.float32, number=plan.heads: pltpu.VMEM(
        (plan.chunks, number, rows, columns), dtype)
    scratch = dict(columns=keep(C, LANES, number=plan.rows))
    if plan.token_decay or plan.packed:
        scratch["visible"] = pltpu.VMEM((plan.chunks, C, C), jnp.float32)
        scratch["decay"] = keep(C, C)
    scratch |= {name: keep(*shape) for name, shape in per_head.items()}
    return [pltpu.VMEM((C, C), jnp.float32), scratch]
