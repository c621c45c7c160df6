"""The gated delta rule by chunks, forward and backward: matrix products and one pass of states.

Gated Delta Networks (https://arxiv.org/abs/2412.06464), section 3.3. What a chunk's tokens write
depends on what the earlier ones wrote: a triangular system. With D the decay between two tokens
(`Weights.intra`), S the state that enters and E the rows that are written,

    A = strictly_lower(beta (k k^T) D),    (I + A) E = beta (v - read k S),
    o = scale ((q k^T) D E + read q S),    S_next = keep S + (write k)^T E

Only the passing of states is sequential, three products per chunk. The backward pass is the
transpose of these equations, so the inverse is never differentiated: with dR the gradient of the
system's right side, `dR = (I + A)^-T dE` and `dA = -strictly_lower(dR E^T)`.

Chunks are worked on a span at a time. The forward pass keeps the state before each span, and the
backward pass computes the rest again: memory is the inputs' and K V / (n C) per token and head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule import chunks, reference
from pallas_kernels.gated_delta_rule.chunks import Weights
from pallas_kernels.gated_delta_rule.triangular import unit_lower_inverse
from pallas_kernels.precision import exact_products

FEW = 8  # tokens that are cheaper one by one
_SPAN = 4  # chunks


def gated_delta_rule(q, k, v, beta, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    B, T, H, V = v.shape
    if T <= FEW:
        return reference.gated_delta_rule(
            q, k, v, beta, decay, scale=scale, initial_state=initial_state, segments=segments,
            output_final_state=output_final_state, chunk_size=None, unroll=T)
    q = reference.queries_per_state(q, H)
    o, state = _by_chunks(scale, q, k, v, beta, decay, initial_state, segments, chunk_size)
    o = jnp.moveaxis(o.reshape(*o.shape[:4], q.shape[3], -1, V), -2, -3)
    return chunks.joined(o, T).reshape(B, T, -1, V), state


def affine_map(k, v, beta, decay, segments):
    """M [B, H, K, K] and U [B, H, K, V] of the row, to which `S_out = M S_in + U`.

    The columns of a state do not meet: one more for each key, with no value, from the identity.
    """
    (B, T, H, V), K = v.shape, k.shape[-1]
    dtype = _accumulator(v)
    nothing = jnp.zeros((B, H, K, V), dtype)
    eye = jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, H, K, K))
    values = jnp.concatenate([v, jnp.zeros((B, T, H, K), v.dtype)], axis=-1)
    no_queries = jnp.zeros((B, T, H, 0, K), k.dtype)
    state = jnp.concatenate([nothing, eye], axis=-1)
    _, state = _by_chunks(1.0, no_queries, k, values, beta, decay, state, segments, None)
    return state[..., V:], state[..., :V]


def _by_chunks(scale, q, k, v, beta, decay, initial_state, segments, chunk_size):
    """q is [B, T, H, R, K]; outputs are [S, n, B, H, R C, V]."""
    T, H = v.shape[1:3]
    C = _power_of_two(min(T, chunk_size or 64))
    N = -(-T // C)
    n = -(-N // -(-N // _SPAN))  # as even as possible
    q = jnp.moveaxis(chunks.cut(q, n, C), -2, -3)
    q = q.reshape(*q.shape[:4], q.shape[4] * C, q.shape[-1])  # a group's queries: more rows
    k = chunks.cut(reference.keys_per_state(k, H), n, C)
    v, beta = chunks.cut(v, n, C), chunks.cut(beta, n, C)
    decay = jnp.zeros_like(beta) if decay is None else chunks.cut(decay, n, C)
    documents = None if segments is None else chunks.documents(segments, n, C)
    if initial_state is None:
        initial_state = jnp.zeros_like(k[0, 0, :, :, 0, :, None] * v[0, 0, :, :, 0, None, :])
    initial_state = initial_state.astype(_accumulator(v))
    return _chunked(float(scale), (q, k, v, beta, decay), documents, initial_state)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _accumulator(x) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


# ---------------------------------------------------------------- spans


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(scale, arrays, documents, state):
    return _forward(scale, arrays, documents, state)[0]


def _forward(scale, arrays, documents, initial_state):
    def step(state, span):
        o, after = _span_forward(scale, _Span.of(scale, *span), state)
        return after, (o.astype(arrays[2].dtype), state)

    state, (o, before) = jax.lax.scan(step, initial_state, (arrays, documents))
    return (o, state), (arrays, documents, before)


def _backward(scale, saved, gradients):
    arrays, documents, before = saved
    do, dstate = gradients

    def step(dstate, span):
        arrays, documents, before, do = span
        *gradients, dstate = _span_backward(
            scale, _Span.of(scale, arrays, documents), before, do, dstate)
        if documents is not None:  # the decay of padding is not used
            gradients[-1] = jnp.where(documents.tokens != 0, gradients[-1], 0)
        return dstate, tuple(g.astype(x.dtype) for g, x in zip(gradients, arrays, strict=True))

    dstate, gradients = jax.lax.scan(
        step, dstate, (arrays, documents, before, do), reverse=True)
    return gradients, None, dstate


_chunked.defvjp(_forward, exact_products(_backward))


# ---------------------------------------------------------------- the chunks of a span


class _Span(NamedTuple):
    """What is known of chunks before their states: all of it in f32, [n, B, H, ...]."""

    q: Float[Array, "n B H RC K"]
    k: Float[Array, "n B H C K"]
    v: Float[Array, "n B H C V"]
    beta: Float[Array, "n B H C 1"]
    weights: Weights
    qk: Float[Array, "n B H RC C"]  # scale q k^T
    kk: Float[Array, "n B H C C"]  # k k^T, strictly lower
    inverse: Float[Array, "n B H C C"]  # (I + A)^-1

    @classmethod
    def of(cls, scale, arrays, documents):
        q, k, v, beta, decay = (x.astype(_accumulator(arrays[2])) for x in arrays)
        weights, beta = chunks.weights(decay, documents), beta[..., None]
        q = scale * q
        kk = jnp.tril(k @ k.mT, -1)
        inverse = unit_lower_inverse(beta * kk * weights.intra)
        return cls(q, k, v, beta, weights, q @ k.mT, kk, inverse)

    @property
    def right(self):
        """What a state contributes to the right side of the system, as its factor."""
        return self.beta * self.weights.read * self.k

    @property
    def tail(self):
        return self.weights.write * self.k

    def per_query(self, weight):
        """A weight per token, for the rows of a group's queries."""
        return jnp.tile(weight, (1, 1, 1, self.q.shape[-2] // self.k.shape[-2], 1))

    def over_queries(self, rows):
        """The sum over a group's queries of rows [n, B, H, RC, *]."""
        C = self.k.shape[-2]
        group = rows.shape[-2] // C
        return rows.reshape(*rows.shape[:3], group, C, rows.shape[-1]).sum(-3)


def _pass_states(span, state):
    """The state before each chunk, what its tokens write, and the state after the last."""

    def step(state, chunk):
        inverse, target, right, tail, keep = chunk
        written = inverse @ (target - right @ state)
        return keep * state + tail.mT @ written, (state, written)

    chunk = (span.inverse, span.beta * span.v, span.right, span.tail, span.weights.keep)
    after, (states, written) = jax.lax.scan(step, state, chunk)
    return states, written, after


def _span_forward(scale, span, state):
    states, written, after = _pass_states(span, state)
    intra, read = span.per_query(span.weights.intra), span.per_query(span.weights.read)
    o = (span.qk * intra) @ written + (read * span.q) @ states
    return o, after


def _span_backward(scale, span, state, do, dafter):
    """Gradients of (q, k, v, beta, decay, state) from those of the outputs and the last state."""
    q, k, v, beta, weights = span[:5]
    states, written, _ = _pass_states(span, state)
    do = do.astype(v.dtype)
    intra, read = span.per_query(weights.intra), span.per_query(weights.read)

    def step(dafter, chunk):
        inverse, right, tail, keep, dwritten, dstate = chunk
        dright = inverse.mT @ (dwritten + tail @ dafter)
        return keep * dafter + dstate - right.mT @ dright, (dafter, dright)

    chunk = (span.inverse, span.right, span.tail, weights.keep, (span.qk * intra).mT @ do,
             (read * q).mT @ do)
    dstate, (dafter, dright) = jax.lax.scan(step, dafter, chunk, reverse=True)

    dqk = (do @ written.mT) * intra
    dq_read = read * (do @ states.mT)
    dk_right = -weights.read * (dright @ states.mT)
    dk_tail = weights.write * (written @ dafter.mT)
    da = -jnp.tril(dright @ written.mT, -1) * weights.intra
    dkk = beta * da
    dbeta = _rows(dright * v) + _rows(dk_right * k) + _rows(da * span.kk)
    dk = dqk.mT @ q + (dkk + dkk.mT) @ k + beta * dk_right + dk_tail
    ddecay = _decay_gradient(
        between=jnp.tril(span.over_queries(dqk * span.qk), -1) + dkk * span.kk,
        read=span.over_queries(_rows(dq_read * q)) + beta * _rows(dk_right * k),
        write=_rows(dk_tail * k),
        keep=weights.keep * jnp.sum(states * dafter, (-2, -1), keepdims=True),
    )
    return scale * (dqk @ k + dq_read), dk, beta * dright, dbeta[..., 0], ddecay[..., 0], dstate


def _decay_gradient(between, read, write, keep):
    """The gradient of each token's log decay, from those of the logarithms of the weights.

    A token's decay is part of the weight from j to i if j < token <= i. What does not decay (from
    a token to itself) is in no sum, so that nothing has to cancel.
    """
    reaching = read + _rows(between) - jnp.sum(between, -2)[..., None]
    later = jnp.cumsum(reaching[..., ::-1, :], axis=-2)[..., ::-1, :]
    earlier = jnp.cumsum(write, axis=-2) - write
    return later + earlier + keep


def _rows(x):
    return jnp.sum(x, axis=-1, keepdims=True)
