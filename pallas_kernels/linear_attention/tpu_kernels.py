"""The Pallas Mosaic TPU kernels of linear attention by chunks, forward and backward.

The equations of `xla.py`, with S the state that enters a chunk and D the decay from token to token
within it, times `scale` (as are the weights `read`):

    P = (Q K^T) . D        O = P V + read . (Q S)        S' = keep S + K^T (write . V)

and, for gradients dO of the outputs and dS' of the state that leaves, with E = (dO V^T) . D,

    dQ = E K + read . (dO S^T)        dK = E^T Q + write . (V dS'^T)
    dV = P^T dO + write . (K dS')     dS = keep dS' + Q^T (read . dO)

A grid step takes several chunks of several heads: their matrix products are independent but for
the states, and fill each other's latencies. What one product leaves for another waits in VMEM, so
that registers suffice; and what needs no state is done one chunk ahead. The forward pass of a
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

from pallas_kernels.mosaic_tpu import LANES, NN, NT, as_column, call, dot, unknown_zero

_VMEM = 40 * 2**20  # bytes: the default, 16 MiB, is too few for the scratch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built."""

    heads: int  # per grid step
    chunk: int  # tokens per chunk
    chunks: int  # per grid step
    scale: float
    token_decay: bool
    packed: bool
    exact: bool  # float32: differences of running decays need what rounding took from them

    @property
    def block(self):
        return self.chunk * self.chunks

    # Rows of the array of weights: a group of `heads` each, one for the documents' first tokens.
    def row(self, name, head=0):
        return self._groups.index(name) * self.heads + head

    @property
    def _groups(self):
        total = ["total"] * self.token_decay + ["rest"] * (self.token_decay and self.exact)
        return ("read", "write", "keep", *total, "first")

    @property
    def rows(self):
        return self.row("first") + self.packed

    @property
    def weights(self):
        """The number of arrays of weights."""
        return 1 if self.token_decay else 2


class _Chunk:
    """One chunk of a grid step: its part of the arrays, and the weights of its heads.

    Weights are rows (tokens are lanes) or columns (tokens are sublanes, repeated in all lanes).
    """

    def __init__(self, plan, index, rows_ref, intra_ref, keys_ref, scratch):
        self.plan = plan
        self.rows, self.intra_ref, self.keys_ref = rows_ref.at[0, index, 0], intra_ref, keys_ref
        self.tokens = slice(index * plan.chunk, (index + 1) * plan.chunk)
        self.again = unknown_zero()  # loads by it are not shared with those by 0
        self.scratch = {name: ref.at[self.again + index] for name, ref in scratch.items()}

    def at(self, head, width, block=0):
        return block, self.tokens, slice(head * width, (head + 1) * width)

    def row(self, name, head):
        at = self.plan.row(name, head)
        return self.rows[at:at + 1]

    def column(self, name, head, width):
        column = self.scratch["columns"][self.plan.row(name, head)]
        if width <= LANES:
            return column[:, :width]
        return jnp.concatenate([column] * (width // LANES), axis=1)

    def transposed(self, x, name, head):
        """x^T with its tokens weighted."""
        return (x.T * self.row(name, head)).astype(x.dtype)

    def keep(self, head):
        return self.row("keep", head)[:, :1]

    def prepare(self, names):
        """The columns of the weights in `names`, and the decays from token to token."""
        plan, columns = self.plan, self.scratch["columns"]
        if plan.token_decay:
            names += ("total", "rest") if plan.exact else ("total",)
        rows = [plan.row(name, head) for head in range(plan.heads) for name in names]
        for at in rows + [plan.row("first")] * plan.packed:
            columns[at] = as_column(self.rows[at:at + 1])
        if plan.token_decay or plan.packed:
            first = self.column("first", 0, plan.chunk) if plan.packed else 0
            shown, hidden = (0.0, -jnp.inf) if plan.token_decay else (1.0, 0.0)
            self.scratch["visible"][...] = jnp.where(self.keys_ref[...] >= first, shown, hidden)
        for head in range(plan.heads if plan.token_decay else 0):
            difference = self.column("total", head, plan.chunk) - self.row("total", head)
            if plan.exact:
                difference += self.column("rest", head, plan.chunk) - self.row("rest", head)
            visible = self.scratch["visible"][...]
            self.scratch["decay"][head] = plan.scale * jnp.exp(difference + visible)

    def intra(self, head):
        """The decays from token to token."""
        if self.plan.token_decay:
            return self.scratch["decay"][head]
        intra = self.intra_ref[head]
        return intra * self.scratch["visible"][...] if self.plan.packed else intra


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
     dq_ref, dk_ref, dv_ref, dstate_ref, *dtotal_ref, keys_ref, scratch, state_ref) = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]
        keys_ref[...] = _keys(plan.chunk)

    chunks = _chunks_of_step(plan, weights_refs, keys_ref, scratch)
    for chunk in chunks:
        chunk.prepare(("read", "write"))
    for head in range(plan.heads):
        state = states_ref[0, 0, head]
        state_ref[0, head] = state.astype(state_ref.dtype)
        for index, chunk in enumerate(chunks[:-1]):
            k_written = chunk.transposed(k_ref[chunk.at(head, K)], "write", head)
            state = chunk.keep(head) * state + dot(k_written, v_ref[chunk.at(head, V)], NN)
            state_ref[index + 1, head] = state.astype(state_ref.dtype)
    for index, chunk in reversed(list(enumerate(chunks))):
        for head in range(plan.heads):
            at_k, at_v = chunk.at(head, K), chunk.at(head, V)
            q, k, v, do = q_ref[at_k], k_ref[at_k], v_ref[at_v], do_ref[at_v]
            state, dstate = state_ref[index, head], dstate_ref[0, head]
            read = functools.partial(chunk.column, "read", head)
            write = functools.partial(chunk.column, "write", head)
            narrow = dstate.astype(q.dtype)
            intra = chunk.intra(head)
            p, e = dot(q, k, NT) * intra, dot(do, v, NT)
            moments = p * e if decay_gradient else None
            p, e = p.astype(q.dtype), (e * intra).astype(q.dtype)
            dv = dot(p.T, do, NN) + write(V) * dot(k, narrow, NN)
            dv_ref[at_v] = dv.astype(dv_ref.dtype)
            dq_read, dk_write = read(K) * dot(do, state, NT), write(K) * dot(v, narrow, NT)
            dq_ref[at_k] = (dot(e, k, NN) + dq_read).astype(dq_ref.dtype)
            dk_ref[at_k] = (dot(e.T, q, NN) + dk_write).astype(dk_ref.dtype)
            dkept = chunk.keep(head) * dstate
            dstate_ref[0, head] = dkept + dot(chunk.transposed(q, "read", head), do, NN)
            if decay_gradient:
                dtotal_ref[0][0, index, 0, head:head + 1] = _decay_gradient(
                    moments, dq_read * q, dk_write * k, jnp.sum(dkept * state))


def _decay_gradient(moments, read, written, kept):
    """The gradient by the running decay of a chunk's tokens, as a row."""
    C = len(moments)
    i, j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    # What a token gives to itself, and the last one to the state, would cancel but for rounding.
    moments = jnp.where(j < i, moments, 0)
    read, written = (jnp.sum(x, axis=1, keepdims=True) for x in (read, written))
    written = jnp.where(i[:, :1] < C - 1, written, 0)
    column = jnp.sum(moments, axis=1, keepdims=True) + read - written
    row = _row(column) - jnp.sum(moments, axis=0, keepdims=True)
    last = lax.broadcasted_iota(jnp.int32, row.shape, 1) == C - 1
    return row + jnp.where(last, kept + jnp.sum(written), 0)


def _row(column):
    return jnp.broadcast_to(column, (len(column), LANES)).T[:1]


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
        dtotal=pl.BlockSpec((1, plan.chunks, 1, heads, C),
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
            written=(K, V)), vmem_limit_bytes=_VMEM)


def backward(plan, q, k, v, do, dstate, states, weights, decay_gradient):
    B, T, _ = q.shape
    _, H, K, V = dstate.shape
    blocks = T // plan.block
    specs, inputs = _specs(plan, B, T, H, K, V, weights, lambda n: blocks - 1 - n)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, dstate)]
    outputs = ["K", "K", "V", "state"]
    if decay_gradient:
        shapes.append(jax.ShapeDtypeStruct(
            (B, T // plan.chunk, H // plan.heads, plan.heads, plan.chunk), jnp.float32))
        outputs.append("dtotal")
    kernel = functools.partial(_backward_kernel, plan, K, V, decay_gradient)
    return call(
        kernel, "linear_attention_backward", specs,
        inputs + ["K", "K", "V", "V", "state", "states"], outputs,
        [x for x in weights if x is not None] + [q, k, v, do, dstate, states], shapes,
        (H // plan.heads, B, blocks),
        [*_scratch(plan), pltpu.VMEM((plan.chunks, plan.heads, K, V), q.dtype)],
        vmem_limit_bytes=_VMEM)


def _scratch(plan, **per_head):
    """The numbers of the keys, and what is kept of each chunk: shapes and types by name."""
    C = plan.chunk
    keep = lambda rows, columns, dtype=jnp.float32, number=plan.heads: pltpu.VMEM(
        (plan.chunks, number, rows, columns), dtype)
    scratch = dict(columns=keep(C, LANES, number=plan.rows))
    if plan.token_decay or plan.packed:
        scratch["visible"] = pltpu.VMEM((plan.chunks, C, C), jnp.float32)
    if plan.token_decay:
        scratch["decay"] = keep(C, C)
    scratch |= {name: keep(*shape) for name, shape in per_head.items()}
    return [pltpu.VMEM((C, C), jnp.float32), scratch]
