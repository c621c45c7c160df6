"""The Pallas Mosaic TPU kernels of the gated delta rule by chunks, forward and backward.

The equations of `xla.py`: with S the state that enters a chunk, D the decay from token to token,
and T the inverse of I + A, A = strictly_lower(beta (K K^T) . D),

    E = T (beta (V - read K S))        O = scale ((Q K^T) . D E + read Q S)
    S' = keep S + K^T (write E)

and, for gradients dO of the outputs and dS' of the state that leaves, with P = scale (Q K^T) . D,

    dE = P^T dO + write (K dS')        dR = T^T dE        dV = beta dR
    dS = keep dS' + scale (read Q)^T dO - (beta read K)^T dR

A grid step takes several chunks of several heads: their inverses do not wait for a state, and fill
the latencies of the products that do. The forward pass of a gradient keeps the state that enters
each grid step; the backward pass computes the inverses, the other states and E again.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule.tpu_triangular import lockstep, unit_lower_inverse
from pallas_kernels.mosaic_tpu import LANES, NN, NT, call, dot


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built; heads are those of a grid step."""

    heads: int  # states
    keys: int  # divides `heads`
    queries: int  # divides `heads`, or is a multiple
    chunk: int  # tokens per chunk
    chunks: int  # per grid step
    scale: float
    packed: bool
    exact: bool  # float32

    @property
    def block(self):
        return self.chunk * self.chunks

    # Rows of the array of weights: a group of `heads` each, one for the documents' first tokens.
    def row(self, name, head=0):
        return self._groups.index(name) * self.heads + head

    @property
    def _groups(self):
        return ("beta", "read", "write", "keep", "total", *["rest"] * self.exact, "first")

    @property
    def rows(self):
        return self.row("first") + self.packed

    def key(self, head):
        return head * self.keys // self.heads

    def queries_of(self, head):
        group = max(1, self.queries // self.heads)
        first = head * self.queries // self.heads
        return range(first, first + group)

    def output(self, query, head):
        return query if self.queries > self.heads else head

    # Rows of the array of their gradients.
    def gradient(self, name, head=0):
        return ("beta", "reaching", "write").index(name) * self.heads + head

    @property
    def gradients(self):
        return 3 * self.heads


class _Chunk:
    """One chunk of a grid step: its part of the arrays, and the weights of its heads.

    Weights are rows (tokens are lanes) or columns (tokens are sublanes).
    """

    def __init__(self, plan, index, rows_ref, columns_ref):
        self.plan, self.index = plan, index
        self.rows_ref, self.columns_ref = rows_ref.at[0, index, 0], columns_ref.at[index]
        self.tokens = slice(index * plan.chunk, (index + 1) * plan.chunk)
        # The compiler would make columns anew for each use.
        self.column, self.intra = functools.cache(self._column), functools.cache(self._intra)
        self._visible = functools.cache(self._visible)

    def at(self, head, width):
        return 0, self.tokens, slice(head * width, (head + 1) * width)

    def row(self, name, head=0):
        at = self.plan.row(name, head)
        return self.rows_ref[at:at + 1]

    def keep(self, head):
        return self.row("keep", head)[:, :1]

    def _column(self, name, head=0):
        at = self.plan.row(name, head)
        return self.columns_ref[:, at:at + 1]

    def _visible(self):
        """Which tokens j of a document come before token i, or are it."""
        C = self.plan.chunk
        j = lax.broadcasted_iota(jnp.int32, (C, C), 1)
        visible = j <= lax.broadcasted_iota(jnp.int32, (C, C), 0)
        if self.plan.packed:
            visible &= j >= self.column("first").astype(jnp.int32)
        return visible

    def _intra(self, head):
        difference = self.column("total", head) - self.row("total", head)
        if self.plan.exact:
            difference += self.column("rest", head) - self.row("rest", head)
        return jnp.exp(jnp.where(self._visible(), difference, -jnp.inf))


def _chunks_of_step(plan, rows_ref, columns_ref):
    for index in range(plan.chunks):
        rows = rows_ref[0, index, 0]
        rows = jnp.concatenate([rows, jnp.zeros((LANES - len(rows), plan.chunk), rows.dtype)])
        columns_ref[index] = rows.T
    return [_Chunk(plan, index, rows_ref, columns_ref) for index in range(plan.chunks)]


def _strictly_lower(x):
    i, j = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(j < i, x, 0.0)


def _write(chunk, head, k, v, state, inverse_ref):
    """What the tokens of a chunk write, and the state after it."""
    error = v - chunk.column("read", head) * dot(k, state.astype(k.dtype), NN)
    yield
    right = (chunk.column("beta", head) * error).astype(k.dtype)
    written = dot(inverse_ref[chunk.index, head], right, NN).astype(k.dtype)
    yield
    k_write = (k.T * chunk.row("write", head)).astype(k.dtype)
    return written, chunk.keep(head) * state + dot(k_write, written, NN)


def _in_order(step, chunks, plan, k_ref, K, inverse_ref):
    """`step` of each chunk, from state to state, while the next chunk's systems are inverted."""

    def invert(chunk, head):
        k = k_ref[chunk.at(plan.key(head), K)]
        a = _strictly_lower(chunk.column("beta", head) * dot(k, k, NT) * chunk.intra(head))
        yield
        inverse = yield from unit_lower_inverse(a, plan.exact)
        inverse_ref[chunk.index, head] = inverse.astype(inverse_ref.dtype)

    heads = range(plan.heads)
    lockstep(invert(chunks[0], head) for head in heads)
    for chunk, later in itertools.zip_longest(chunks, chunks[1:]):
        chains = [step(chunk, head) for head in heads]
        if later is not None:
            chains += [invert(later, head) for head in heads]
        lockstep(chains)


def _forward_kernel(plan, K, V, keep_states, *refs):
    (rows_ref, q_ref, k_ref, v_ref, initial_ref, o_ref, state_ref, *states_ref,
     columns_ref, inverse_ref) = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    if keep_states:
        states_ref[0][0, 0] = state_ref[0]

    def step(chunk, head):
        k, state = k_ref[chunk.at(plan.key(head), K)], state_ref[0, head]
        written, state_ref[0, head] = yield from _write(
            chunk, head, k, v_ref[chunk.at(head, V)], state, inverse_ref)
        read, state = chunk.column("read", head), state.astype(k.dtype)
        for query in plan.queries_of(head):
            yield
            q = q_ref[chunk.at(query, K)]
            p = (plan.scale * dot(q, k, NT) * chunk.intra(head)).astype(k.dtype)
            o = dot(p, written, NN) + plan.scale * read * dot(q, state, NN)
            o_ref[chunk.at(plan.output(query, head), V)] = o.astype(o_ref.dtype)

    chunks = _chunks_of_step(plan, rows_ref, columns_ref)
    _in_order(step, chunks, plan, k_ref, K, inverse_ref)


def _backward_kernel(plan, K, V, *refs):
    (rows_ref, q_ref, k_ref, v_ref, do_ref, dlast_ref, before_ref,
     dq_ref, dk_ref, dv_ref, dweights_ref, dstate_ref,
     columns_ref, dcolumns_ref, inverse_ref, written_ref, state_ref, next_ref) = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]

    def again(chunk, head):
        """What the forward pass did not keep."""
        index, k = chunk.index, k_ref[chunk.at(plan.key(head), K)]
        state = next_ref[head] if index else before_ref[0, 0, head]
        state_ref[index, head] = state.astype(k.dtype)
        written_ref[index, head], next_ref[head] = yield from _write(
            chunk, head, k, v_ref[chunk.at(head, V)], state, inverse_ref)

    def step(chunk, head, dq, dk):
        index, k, v = chunk.index, k_ref[chunk.at(plan.key(head), K)], v_ref[chunk.at(head, V)]
        narrow = lambda x: x.astype(k.dtype)
        intra = chunk.intra(head)
        beta, read, write = (chunk.column(name, head) for name in ("beta", "read", "write"))
        written, state = written_ref[index, head], state_ref[index, head]
        dafter = dstate_ref[0, head]
        dwritten = write * dot(k, narrow(dafter), NN)
        dk_tail = write * dot(written, narrow(dafter), NT)
        dstate = chunk.keep(head) * dafter
        kept = jnp.sum(dstate * state, keepdims=True)
        dk_own, reaching, between = dk_tail, 0.0, 0.0
        yield
        for query in plan.queries_of(head):
            q, do = q_ref[chunk.at(query, K)], do_ref[chunk.at(plan.output(query, head), V)]
            qk = plan.scale * dot(q, k, NT)
            dqk = dot(do, written, NT) * intra
            dwritten += dot(narrow(qk * intra).T, do, NN)
            yield
            dq_read = plan.scale * read * dot(do, state, NT)
            dstate += plan.scale * dot(narrow(q.T * chunk.row("read", head)), do, NN)
            yield
            between += dqk * qk
            dqk = narrow(plan.scale * dqk)
            dq[query].append(dot(dqk, k, NN) + dq_read)
            dk_own += dot(dqk.T, q, NN)
            reaching += _rows(dq_read * q)
            yield
        dright = dot(inverse_ref[index, head].T, narrow(dwritten), NN)
        dv_ref[chunk.at(head, V)] = (beta * dright).astype(dv_ref.dtype)
        yield
        dbeta, dright = _rows(dright * v), narrow(dright)
        k_right = narrow(k.T * (chunk.row("beta", head) * chunk.row("read", head)))
        dstate_ref[0, head] = dstate - dot(k_right, dright, NN)
        dk_right = -read * dot(dright, state, NT)
        da = _strictly_lower(-dot(dright, written, NT) * intra)
        yield
        kk = dot(k, k, NT)
        dkk = beta * da
        right = _rows(dk_right * k)
        dbeta += right + _rows(da * kk)
        between = _strictly_lower(between) + dkk * kk
        reaching += beta * right + _rows(between)
        yield
        dk[plan.key(head)].append(dk_own + beta * dk_right + dot(narrow(dkk + dkk.T), k, NN))
        for name, x in dict(beta=dbeta, reaching=reaching, write=_rows(dk_tail * k)).items():
            at = plan.gradient(name, head)
            dcolumns_ref[:, at:at + 1] = x
        last = lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1) == plan.chunk - 1
        at = plan.gradient("reaching", head)
        dweights_ref[0, index, 0, at:at + 1] = (
            jnp.where(last, kept, 0.0) - jnp.sum(between, axis=0, keepdims=True))

    chunks = _chunks_of_step(plan, rows_ref, columns_ref)
    dcolumns_ref[...] = jnp.zeros_like(dcolumns_ref)
    dweights_ref[...] = jnp.zeros_like(dweights_ref)
    _in_order(again, chunks, plan, k_ref, K, inverse_ref)
    for chunk in reversed(chunks):
        dq, dk = ([[] for _ in range(n)] for n in (plan.queries, plan.keys))
        lockstep(step(chunk, head, dq, dk) for head in range(plan.heads))
        for query, parts in enumerate(dq):
            dq_ref[chunk.at(query, K)] = sum(parts).astype(dq_ref.dtype)
        for key, parts in enumerate(dk):
            dk_ref[chunk.at(key, K)] = sum(parts).astype(dk_ref.dtype)
        dweights_ref[0, chunk.index, 0] += dcolumns_ref[...].T[:plan.gradients]


def _rows(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _specs(plan, K, V, block_of):
    """Block specs by the kind of array; the grid is (groups of heads, rows, blocks of tokens)."""
    at = lambda heads, width: pl.BlockSpec(
        (1, plan.block, heads * width), lambda h, b, n: (b, block_of(n), h))
    return dict(
        rows=pl.BlockSpec((1, plan.chunks, 1, plan.rows, plan.chunk),
                          lambda h, b, n: (b, block_of(n), h, 0, 0)),
        q=at(plan.queries, K), k=at(plan.keys, K), v=at(plan.heads, V),
        o=at(max(plan.heads, plan.queries), V),
        state=pl.BlockSpec((1, plan.heads, K, V), lambda h, b, n: (b, h, 0, 0)),
        states=pl.BlockSpec((1, 1, plan.heads, K, V), lambda h, b, n: (b, block_of(n), h, 0, 0)),
        dweights=pl.BlockSpec((1, plan.chunks, 1, plan.gradients, plan.chunk),
                              lambda h, b, n: (b, block_of(n), h, 0, 0)),
    )


def forward(plan, rows, q, k, v, initial_state, keep_states):
    B, T, _ = q.shape
    _, H, K, V = initial_state.shape
    blocks, G = T // plan.block, H // plan.heads
    width = G * max(plan.heads, plan.queries) * V
    shapes = [jax.ShapeDtypeStruct((B, T, width), v.dtype),
              jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)]
    outputs = ["o", "state"]
    if keep_states:
        shapes.append(jax.ShapeDtypeStruct((B, blocks, H, K, V), jnp.float32))
        outputs.append("states")
    return call(
        functools.partial(_forward_kernel, plan, K, V, keep_states), "gated_delta_rule_forward",
        _specs(plan, K, V, lambda n: n), ["rows", "q", "k", "v", "state"], outputs,
        [rows, q, k, v, initial_state], shapes, (G, B, blocks),
        [_columns(plan), _inverses(plan, k.dtype)])


def backward(plan, rows, q, k, v, do, dstate, states):
    B, T, _ = q.shape
    _, H, K, V = dstate.shape
    blocks, G = T // plan.block, H // plan.heads
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    shapes += [jax.ShapeDtypeStruct((*rows.shape[:3], plan.gradients, plan.chunk), jnp.float32),
               jax.ShapeDtypeStruct(dstate.shape, jnp.float32)]
    per_chunk = lambda *shape: pltpu.VMEM((plan.chunks, plan.heads, *shape), k.dtype)
    scratch = [
        _columns(plan),
        pltpu.VMEM((plan.chunk, LANES), jnp.float32),
        _inverses(plan, k.dtype), per_chunk(plan.chunk, V), per_chunk(K, V),
        pltpu.VMEM((plan.heads, K, V), jnp.float32),
    ]
    return call(
        functools.partial(_backward_kernel, plan, K, V), "gated_delta_rule_backward",
        _specs(plan, K, V, lambda n: blocks - 1 - n),
        ["rows", "q", "k", "v", "o", "state", "states"], ["q", "k", "v", "dweights", "state"],
        [rows, q, k, v, do, dstate, states], shapes, (G, B, blocks), scratch)


def _columns(plan):
    return pltpu.VMEM((plan.chunks, plan.chunk, LANES), jnp.float32)


def _inverses(plan, dtype):
    return pltpu.VMEM((plan.chunks, plan.heads, plan.chunk, plan.chunk), dtype)
