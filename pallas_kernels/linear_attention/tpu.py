"""Linear attention by chunks as Pallas Mosaic TPU kernels, forward and backward.

The equations of `xla.py`, with S the state that enters a chunk and D the decay from token to token
within it, times `scale` (as are the weights `read`):

    P = (Q K^T) . D        O = P V + read . (Q S)        S' = keep S + K^T (write . V)

and, for gradients dO of the outputs and dS' of the state that leaves, with E = (dO V^T) . D,

    dQ = E K + read . (dO S^T)        dK = E^T Q + write . (V dS'^T)
    dV = P^T dO + write . (K dS')     dS = keep dS' + Q^T (read . dO)

A grid step takes several chunks of several heads: their matrix products are independent but for
the states, and fill each other's latencies. Heads are lanes of `[B, T, H K]`, so no array is
transposed on the way in or out. The forward pass of a gradient keeps the state that enters each
grid step; the backward pass recomputes those in between.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target_platform
from pallas_kernels.linear_attention.xla import _chunks, _documents_at_borders

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built."""

    heads: int  # per grid step
    chunk: int  # tokens per chunk
    chunks: int  # per grid step
    scale: float
    token_decay: bool
    packed: bool

    @property
    def block(self):
        return self.chunk * self.chunks

    # Rows of the array of weights: a group of `heads` each, one for the documents' first tokens.
    def row(self, name, head=0):
        return ("read", "write", "keep", "total").index(name) * self.heads + head

    @property
    def rows(self):
        return (4 if self.token_decay else 3) * self.heads + self.packed


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    del output_final_state
    if target_platform() != "tpu":
        raise NotImplementedError(f"serves TPU only, the target is {target_platform()}")
    B, T, H, K = q.shape
    V = v.shape[-1]
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"needs q, k, v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    plan = _plan(T, H, K, V, q.dtype, scale, decay, segments, chunk_size)
    padded = [_flat(x, plan.block) for x in (q, k, v)]
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), jnp.float32)
    initial_state = jnp.pad(initial_state.astype(jnp.float32),
                            ((0, 0), (0, 0), (0, -K % _LANES), (0, -V % _LANES)))
    total = _running_decay(decay, plan, T, segments)
    weights = _weights(plan, lax.stop_gradient(decay), lax.stop_gradient(total), segments)
    o, state = _attend(plan, *padded, initial_state, jnp.asarray(total), weights)
    return o.reshape(B, -1, H, V + -V % _LANES)[:, :T, :, :V], state[..., :K, :V]


def _plan(T, H, K, V, dtype, scale, decay, segments, chunk_size):
    chunk = min(chunk_size or 128, T + -T % 16)
    heads = max(n for n in (1, 2, 3, 4) if H % n == 0)
    chunks = min(4, math.ceil(T / chunk))
    return Plan(heads, chunk, chunks, float(scale), decay.ndim == 3, segments is not None)


def _flat(x, block):
    """[B, T, H, K] -> [B, T, H K]; T padded with zeros to blocks, K to lanes."""
    B, T, H, K = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, -K % _LANES)))
    return x.reshape(B, T + -T % block, -1)


def _running_decay(decay, plan, T, segments):
    """The running sum of the log decay in each chunk [B, H, N, C]; B is 1 if all rows agree."""
    C, padded = plan.chunk, T + -T % plan.block
    real = np.arange(padded) < T
    if segments is not None:
        real = jnp.pad(segments != 0, ((0, 0), (0, padded - T)))
    real = real.reshape(-1, 1, padded // C, C)
    if decay.ndim == 1:
        xp = np if segments is None else jnp
        return decay.astype(np.float32)[:, None, None] * xp.cumsum(real, axis=-1)
    decay = _chunks(jnp.pad(decay.astype(jnp.float32), ((0, 0), (0, padded - T), (0, 0))), C)
    return jnp.cumsum(jnp.where(real, decay, 0), axis=-1)


def _weights(plan, decay, total, segments):
    """Decay and documents as the kernels read them: rows [B, N, H / heads, rows, C], D [H, C, C].

    D is None for a decay per token: the kernels take it from the running sums.
    """
    end = total[..., -1:]
    read, write, keep = jnp.exp(total), jnp.exp(end - total), jnp.exp(end)
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, total.shape[2] * plan.chunk - segments.shape[1])))
        segments = _chunks(segments[..., None], plan.chunk)
        before, after = _documents_at_borders(segments)
        real = segments != 0
        read = jnp.where(real & (segments == before), read, 0)
        write = jnp.where(real & (segments == after), write, 0)
        keep = jnp.where(before == after, keep, 0)
    groups = [plan.scale * read, write, jnp.broadcast_to(keep, write.shape)]
    if plan.token_decay:
        groups.append(total)
    rows = jnp.stack(groups)  # [groups, B, H, N, C]
    rows = rows.reshape(*rows.shape[:2], -1, plan.heads, *rows.shape[3:])
    rows = rows.transpose(1, 4, 2, 0, 3, 5)
    rows = rows.reshape(*rows.shape[:3], -1, plan.chunk)
    if plan.packed:
        first = jnp.moveaxis(_first_of_document(segments), 1, 2)[:, :, None]
        first = jnp.broadcast_to(first, (*rows.shape[:3], 1, plan.chunk))
        rows = jnp.concatenate([rows, first], axis=3)
    if plan.token_decay:
        return rows, None
    i = np.arange(plan.chunk)
    distance = i[:, None] - i
    exponent = jnp.where(distance >= 0, decay.astype(jnp.float32)[:, None, None] * distance, -jnp.inf)
    return rows, plan.scale * jnp.exp(exponent)


def _first_of_document(segments):
    """Where in its chunk a token's document begins, C for padding: [B, 1, N, C] in f32."""
    C = segments.shape[-1]
    i = np.arange(C)
    begins = segments[..., 1:] != segments[..., :-1]
    begins = jnp.pad(begins, ((0, 0), (0, 0), (0, 0), (1, 0)))
    first = lax.cummax(jnp.where(begins, i, 0), axis=3)
    return jnp.where(segments != 0, first, C).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, initial_state, total, weights):
    del total  # a name for the decay's gradient
    return _forward(plan, q, k, v, initial_state, weights, keep_states=False)


def _attend_forward(plan, q, k, v, initial_state, total, weights):
    perturbed = total.perturbed
    q, k, v, initial_state, total = (x.value for x in (q, k, v, initial_state, total))
    weights = jax.tree.map(lambda x: x.value, weights)
    o, state, states = _forward(plan, q, k, v, initial_state, weights, keep_states=True)
    rows = total.shape[:1] if perturbed else None
    return (o, state), (q, k, v, states, weights, jnp.zeros(rows) if perturbed else None)


def _attend_backward(plan, kept, gradients):
    q, k, v, states, weights, rows = kept
    do, dstate = (jnp.zeros(x.aval.shape, x.aval.dtype) if isinstance(x, jax.custom_derivatives.SymbolicZero) else x
                  for x in gradients)
    dq, dk, dv, dstate, *dtotal = _backward(plan, q, k, v, do, dstate, states, weights,
                                            decay_gradient=rows is not None)
    if rows is not None:
        [dtotal] = dtotal
        B, N, G, heads, C = dtotal.shape
        dtotal = dtotal.transpose(0, 2, 3, 1, 4).reshape(B, G * heads, N, C)
        if len(rows) < B:
            dtotal = dtotal.sum(0, keepdims=True)
    return dq, dk, dv, dstate, dtotal if rows is not None else None, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _dot(a, b, contract):
    """A product of matrices in f32; `contract` names a dimension of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())),
                           precision=precision, preferred_element_type=jnp.float32)


_NN, _NT, _TN = (1, 0), (1, 1), (0, 0)


class _Chunk:
    """One chunk of a grid step: the weights of its heads."""

    def __init__(self, plan, index, rows_ref, intra_ref):
        self.plan, self.intra_ref = plan, intra_ref
        self.tokens = slice(index * plan.chunk, (index + 1) * plan.chunk)
        self.rows = rows_ref[0, index, 0]
        self.columns = self.rows.T
        i = lax.broadcasted_iota(jnp.int32, (plan.chunk, plan.chunk), 0)
        j = lax.broadcasted_iota(jnp.int32, (plan.chunk, plan.chunk), 1)
        self.inside = j <= i
        self.before = j < i
        if plan.packed:
            self.inside &= j >= self.columns[:, -1:].astype(jnp.int32)

    def of(self, ref, head, width):
        return ref[0, self.tokens, head * width:(head + 1) * width]

    def column(self, name, head):
        at = self.plan.row(name, head)
        return self.columns[:, at:at + 1]

    def keep(self, head):
        at = self.plan.row("keep", head)
        return self.rows[at:at + 1, :1]

    def intra(self, head):
        if self.plan.token_decay:
            at = self.plan.row("total", head)
            difference = self.column("total", head) - self.rows[at:at + 1]
            return self.plan.scale * jnp.exp(jnp.where(self.inside, difference, -jnp.inf))
        weight = self.intra_ref[head]
        return jnp.where(self.inside, weight, 0) if self.plan.packed else weight


def _forward_kernel(plan, K, V, keep_states, *refs):
    rows_ref, *intra_ref = refs[:1 if plan.token_decay else 2]
    q_ref, k_ref, v_ref, initial_ref, o_ref, state_ref, *states_ref = refs[1 + len(intra_ref):]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    if keep_states:
        states_ref[0][0] = state_ref[...]
    for index in range(plan.chunks):
        chunk = _Chunk(plan, index, rows_ref, *(intra_ref or [None]))
        for head in range(plan.heads):
            q, k = chunk.of(q_ref, head, K), chunk.of(k_ref, head, K)
            v = chunk.of(v_ref, head, V)
            state = state_ref[0, head]
            p = _dot(q, k, _NT) * chunk.intra(head)
            o = _dot(p.astype(v.dtype), v, _NN)
            o += chunk.column("read", head) * _dot(q, state.astype(q.dtype), _NN)
            o_ref[0, chunk.tokens, head * V:(head + 1) * V] = o.astype(o_ref.dtype)
            written = (chunk.column("write", head) * v).astype(v.dtype)
            state_ref[0, head] = chunk.keep(head) * state + _dot(k, written, _TN)


def _backward_kernel(plan, K, V, decay_gradient, *refs):
    rows_ref, *intra_ref = refs[:1 if plan.token_decay else 2]
    (q_ref, k_ref, v_ref, do_ref, dlast_ref, states_ref,
     dq_ref, dk_ref, dv_ref, dstate_ref, *refs) = refs[1 + len(intra_ref):]
    *dtotal_ref, scratch = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]

    chunks = [_Chunk(plan, index, rows_ref, *(intra_ref or [None])) for index in range(plan.chunks)]
    for head in range(plan.heads):
        state = states_ref[0, 0, head]
        scratch[0, head] = state.astype(scratch.dtype)
        for index, chunk in enumerate(chunks[:-1]):
            v = chunk.of(v_ref, head, V)
            written = (chunk.column("write", head) * v).astype(v.dtype)
            state = chunk.keep(head) * state + _dot(chunk.of(k_ref, head, K), written, _TN)
            scratch[index + 1, head] = state.astype(scratch.dtype)
    for index, chunk in reversed(list(enumerate(chunks))):
        for head in range(plan.heads):
            q, k = chunk.of(q_ref, head, K), chunk.of(k_ref, head, K)
            v, do = chunk.of(v_ref, head, V), chunk.of(do_ref, head, V)
            read, write = chunk.column("read", head), chunk.column("write", head)
            state, dstate = scratch[index, head], dstate_ref[0, head]
            intra = chunk.intra(head)
            p = _dot(q, k, _NT) * intra
            e = _dot(do, v, _NT)
            moments = e * p if decay_gradient else None
            p, e = p.astype(q.dtype), (e * intra).astype(q.dtype)
            narrow = dstate.astype(q.dtype)
            dq_read = read * _dot(do, state, _NT)
            dk_write = write * _dot(v, narrow, _NT)
            dq = dq_read + _dot(e, k, _NN)
            dk = dk_write + _dot(e, q, _TN)
            dv = write * _dot(k, narrow, _NN) + _dot(p, do, _TN)
            dq_ref[0, chunk.tokens, head * K:(head + 1) * K] = dq.astype(dq_ref.dtype)
            dk_ref[0, chunk.tokens, head * K:(head + 1) * K] = dk.astype(dk_ref.dtype)
            dv_ref[0, chunk.tokens, head * V:(head + 1) * V] = dv.astype(dv_ref.dtype)
            kept = chunk.keep(head) * dstate
            dstate_ref[0, head] = kept + _dot(q, (read * do).astype(q.dtype), _TN)
            if decay_gradient:
                moments = jnp.where(chunk.before, moments, 0)
                written = jnp.sum(dk_write * k, axis=1, keepdims=True)
                read = jnp.sum(dq_read * q, axis=1, keepdims=True)
                column = jnp.sum(moments, axis=1, keepdims=True) + read - written
                end = jnp.sum(written) + jnp.sum(kept * state)
                row = -jnp.sum(moments, axis=0, keepdims=True)
                row += jnp.broadcast_to(column, (plan.chunk, _LANES)).T[:1]
                last = lax.broadcasted_iota(jnp.int32, row.shape, 1) == plan.chunk - 1
                dtotal_ref[0][0, index, 0, head:head + 1] = row + jnp.where(last, end, 0)


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


def _call(kernel, plan, specs, inputs, outputs, arrays, shapes, grid, name, scratch=()):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
    )(*arrays)


def _forward(plan, q, k, v, initial_state, weights, keep_states):
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
    return _call(
        functools.partial(_forward_kernel, plan, K, V, keep_states), plan, specs,
        inputs + ["K", "K", "V", "state"], outputs,
        [x for x in weights if x is not None] + [q, k, v, initial_state], shapes,
        (H // plan.heads, B, blocks), "linear_attention_forward")


def _backward(plan, q, k, v, do, dstate, states, weights, decay_gradient):
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
    return _call(
        functools.partial(_backward_kernel, plan, K, V, decay_gradient), plan, specs,
        inputs + ["K", "K", "V", "V", "state", "states"], outputs,
        [x for x in weights if x is not None] + [q, k, v, do, dstate, states], shapes,
        (H // plan.heads, B, blocks), "linear_attention_backward",
        [pltpu.VMEM((plan.chunks, plan.heads, K, V), q.dtype)])
