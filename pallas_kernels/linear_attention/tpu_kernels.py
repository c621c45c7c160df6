"""The Pallas Mosaic TPU kernels of linear attention by chunks, forward and backward.

The equations of `xla.py`, with S the state that enters a chunk and D the decay from token to token
within it, times `scale` (as are the weights `read`):

    P = (Q K^T) . D        O = P V + read . (Q S)        S' = keep S + K^T (write . V)

and, for gradients dO of the outputs and dS' of the state that leaves, with E = (dO V^T) . D,

    dQ = E K + read . (dO S^T)        dK = E^T Q + write . (V dS'^T)
    dV = P^T dO + write . (K dS')     dS = keep dS' + Q^T (read . dO)

A grid step takes several chunks of several heads: their matrix products are independent but for
the states, and fill each other's latencies. The forward pass of a gradient keeps the state that
enters each grid step; the backward pass recomputes those in between.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import LANES, NN, NT, as_column, call, dot


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

    def __init__(self, plan, index, rows_ref, columns_ref, intra_ref):
        self.plan, self.intra_ref = plan, intra_ref
        self.rows, self.columns = rows_ref.at[0, index, 0], columns_ref.at[index]
        self.tokens = slice(index * plan.chunk, (index + 1) * plan.chunk)

    def at(self, head, width):
        return 0, self.tokens, slice(head * width, (head + 1) * width)

    def row(self, name, head):
        at = self.plan.row(name, head)
        return self.rows[at:at + 1]

    def column(self, name, head, width):
        column = self.columns[self.plan.row(name, head)]
        if width <= LANES:
            return column[:, :width]
        return jnp.concatenate([column] * (width // LANES), axis=1)

    def transposed(self, x, name, head):
        """x^T with its tokens weighted."""
        return (x.T * self.row(name, head)).astype(x.dtype)

    def keep(self, head):
        return self.row("keep", head)[:, :1]

    def intra(self, head):
        plan, C = self.plan, self.plan.chunk
        if not plan.token_decay and not plan.packed:
            return self.intra_ref[head]
        j = lax.broadcasted_iota(jnp.int32, (C, C), 1)
        inside = j <= lax.broadcasted_iota(jnp.int32, (C, C), 0)
        if plan.packed:
            inside &= j >= self.column("first", 0, C).astype(jnp.int32)
        if not plan.token_decay:
            return jnp.where(inside, self.intra_ref[head], 0)
        difference = self.column("total", head, C) - self.row("total", head)
        if plan.exact:
            difference += self.column("rest", head, C) - self.row("rest", head)
        return plan.scale * jnp.exp(jnp.where(inside, difference, -jnp.inf))


def _chunks_of_step(plan, names, weights_refs, columns_ref):
    """The chunks of a grid step, with the weights in `names` turned into columns."""
    rows_ref, *intra_ref = weights_refs
    if plan.token_decay:
        names += ("total", "rest") if plan.exact else ("total",)

    def fill():
        for index in range(plan.chunks):
            for name in names:
                for head in range(plan.heads):
                    at = plan.row(name, head)
                    columns_ref[index, at] = as_column(rows_ref[0, index, 0, at:at + 1])
            if plan.packed:
                at = plan.row("first")
                columns_ref[index, at] = as_column(rows_ref[0, index, 0, at:at + 1])

    step, last = pl.program_id(2), pl.num_programs(2) - 1
    if plan.token_decay or plan.packed:
        fill()
    else:  # only the last block, which may be ragged, differs from the others
        pl.when((step <= 1) | (step == last))(fill)
    return [_Chunk(plan, index, rows_ref, columns_ref, *(intra_ref or [None]))
            for index in range(plan.chunks)]


def _forward_kernel(plan, K, V, keep_states, *refs):
    weights_refs, refs = refs[:plan.weights], refs[plan.weights:]
    q_ref, k_ref, v_ref, initial_ref, o_ref, state_ref, *states_ref, columns_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    if keep_states:
        states_ref[0][0] = state_ref[...]
    for chunk in _chunks_of_step(plan, ("read",), weights_refs, columns_ref):
        for head in range(plan.heads):
            at_k, at_v = chunk.at(head, K), chunk.at(head, V)
            q, k, v, state = q_ref[at_k], k_ref[at_k], v_ref[at_v], state_ref[0, head]
            p = (dot(q, k, NT) * chunk.intra(head)).astype(v.dtype)
            o = dot(p, v, NN)
            o += chunk.column("read", head, V) * dot(q, state.astype(q.dtype), NN)
            o_ref[at_v] = o.astype(o_ref.dtype)
            k_written = chunk.transposed(k, "write", head)
            kept = chunk.keep(head) * state_ref[0, head]  # read again: fewer registers
            state_ref[0, head] = kept + dot(k_written, v, NN)


def _backward_kernel(plan, K, V, decay_gradient, *refs):
    weights_refs, refs = refs[:plan.weights], refs[plan.weights:]
    (q_ref, k_ref, v_ref, do_ref, dlast_ref, states_ref,
     dq_ref, dk_ref, dv_ref, dstate_ref, *dtotal_ref, columns_ref, state_ref) = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]

    chunks = _chunks_of_step(plan, ("read", "write"), weights_refs, columns_ref)
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
    kernel = functools.partial(_forward_kernel, plan, K, V, keep_states)
    return call(
        kernel, "linear_attention_forward", specs,
        inputs + ["K", "K", "V", "state"], outputs,
        [x for x in weights if x is not None] + [q, k, v, initial_state], shapes,
        (H // plan.heads, B, blocks), [_columns(plan)])


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
        [_columns(plan), pltpu.VMEM((plan.chunks, plan.heads, K, V), q.dtype)])


def _columns(plan):
    return pltpu.VMEM((plan.chunks, plan.rows, plan.chunk, LANES), jnp.float32)
