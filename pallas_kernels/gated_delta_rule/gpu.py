"""The gated delta rule on Hopper GPUs by chunks of 64 tokens. bfloat16 inputs. Compiled for sm_90a
and run in JAX's interpreter; not yet run on hardware.

As in xla.py, with D the decay from token to token and `read`, `write`, `keep` that from and to the
states S at a chunk's ends. What does not wait for a state is worked out for all chunks at once
(gpu_chunks.py, `solve`),

    A = strictly_lower(beta (K K^T) D)       P = scale (Q K^T) D
    u = (I + A)^-1 beta V                    w = -(I + A)^-1 beta read K

which leaves to the pass of states (gpu_states.py, `forward`) four products, two of them in turn:

    E = u + w S       S' = keep S + K^T (write E)       O = P E + scale read Q S

Its transpose goes in reverse, from the gradient dS' of the state that leaves (`reverse`):

    dE = P^T dO + write K dS'       dS = keep dS' + Q^T (scale read dO) + w^T dE

The other gradients are again those of single chunks (`gradients`): with dR = (I + A)^-T dE that of
the system's right side, M = -strictly_lower(dR E^T) D and L = scale (dO E^T) D,

    dV = beta dR                    dQ = L K + scale read (dO S^T)
    dK = beta (M K - read (dR S^T)) + (beta M)^T K + L^T Q + write (E dS'^T)

The decay's gradient takes no more products: what decays towards token i is in the rows of dQ and
dK above that it reads by, times q_i and k_i, what decays from it in the others. A token's own
entry of L does not decay and is kept apart, so that nothing has to cancel.

**Work.** At K = V = 128 a chunk of a head costs, forward, 176 kB of HBM traffic (if the two blocks
that share w, q, k and P in the pass of states find them in L2) and 27 MFLOP, 16 of them the
inverse: ten products of 64^3, each in three parts since 8 bits are too few where keys resemble one
another. On an H200 (4.8 TB/s, 990 Tflop/s) these are 37 ns and 27 ns of the whole chip. The
backward pass does the forward again, now keeping the states: 64 kB per chunk and head with their
gradients, until it ends. Short batches are bound by the pass of states: B H V / 64 blocks for 132
SMs, each T / 64 steps long.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.arguments import refuse_traced
from pallas_kernels.documents import to_compare
from pallas_kernels.gated_delta_rule import gpu_chunks, gpu_states, xla
from pallas_kernels.gated_delta_rule.gpu_chunks import Weights
from pallas_kernels.hopper import COLUMNS, C
from pallas_kernels.linear_attention.chunks import in_chunks, within_documents

_MOST_CHUNKS = 2**16 - 1  # of a row: CUDA's limit for a grid's second axis


def gated_delta_rule(q, k, v, beta, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    hopper.refuse_target()
    _refuse_arguments(q, v, scale, chunk_size)
    (B, T, Hq, K), (H, V) = q.shape, v.shape[2:]
    if T <= xla.FEW:  # one by one, as there
        return xla.gated_delta_rule(
            q, k, v, beta, decay, scale=scale, initial_state=initial_state, segments=segments,
            output_final_state=output_final_state, chunk_size=chunk_size)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V))
    decay = jnp.zeros_like(beta) if decay is None else decay
    readers = max(1, Hq // H)  # each with a state of its own: no published model has several
    v, beta, decay = (jnp.repeat(x, readers, axis=2) for x in (v, beta, decay))
    state = jnp.repeat(initial_state.astype(jnp.float32), readers, axis=1)
    pad = lambda x: jnp.pad(x.astype(v.dtype), [
        (0, 0), (0, -T % C), (0, 0), (0, -x.shape[-1] % COLUMNS)])
    state = jnp.pad(state, [(0, 0), (0, 0), (0, -K % COLUMNS), (0, -V % COLUMNS)])
    beta, decay = (in_chunks(x.astype(jnp.float32), C) for x in (beta, decay))
    if segments is not None:
        segments = in_chunks(segments[..., None], C)
        decay = jnp.where(segments != 0, decay, 0)
    o, state = _rule(float(scale), pad(q), pad(k), pad(v), beta, decay, state, segments)
    return o[:, :T, :, :V], state[:, ::readers, :K, :V]


def _refuse_arguments(q, v, scale, chunk_size):
    if v.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"needs v in bfloat16 (float32 products would be tf32, 1e-3), got {v.dtype}")
    if q.shape[-1] > 128 or v.shape[-1] > 256:
        raise NotImplementedError("needs K up to 128 (a wider state leaves the registers) and V up "
                                  f"to 256, got {q.shape[-1]} and {v.shape[-1]}")
    if q.shape[1] > _MOST_CHUNKS * C:
        raise NotImplementedError(
            f"needs rows of up to {_MOST_CHUNKS * C} tokens, got {q.shape[1]}: give longer ones in "
            "pieces, each from the state of the one before")
    if chunk_size not in (None, C):
        raise NotImplementedError(f"works by chunks of {C}, got chunk_size {chunk_size}")
    refuse_traced(scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(scale, q, k, v, beta, decay, initial_state, segments):
    weights = _weights(scale, beta, decay, segments)
    systems = gpu_chunks.solve(q, k, v, weights, keep_inverse=False)
    out = gpu_states.forward(q, k, systems, weights, initial_state, keep_states=False)
    return out["o"], out["state"]


def _rule_forward(scale, *arguments):
    return _rule(scale, *arguments), arguments


def _rule_backward(scale, saved, cotangents):
    q, k, v, beta, decay, initial_state, segments = saved
    do, dstate = cotangents
    weights = _weights(scale, beta, decay, segments)
    systems = gpu_chunks.solve(q, k, v, weights, keep_inverse=True)
    ahead = gpu_states.forward(q, k, systems, weights, initial_state, keep_states=True)
    back = gpu_states.reverse(q, k, systems, do, weights, dstate)
    found = gpu_chunks.gradients(
        q, k, v, do, ahead["e"], back["e"], ahead["states"], back["states"], systems.inverse,
        weights)
    dbeta, reaching, write, kept = jnp.moveaxis(found["dtokens"], 3, 0)
    later = jnp.flip(jnp.cumsum(jnp.flip(reaching, -1), axis=-1), -1)
    through = weights.keep[..., None] * kept.sum(-1, keepdims=True)
    ddecay = later + (jnp.cumsum(write, axis=-1) - write) + through
    return (_over_sharing_heads(found["dq"], q), _over_sharing_heads(found["dk"], k), found["dv"],
            dbeta, ddecay, back["state"], None)


_rule.defvjp(_rule_forward, _rule_backward)


def _over_sharing_heads(parts: Float[Array, "B T H P K"], x: Float[Array, "B T Hx K"]):
    return parts.reshape(*x.shape[:3], -1, x.shape[-1]).sum(3, dtype=jnp.float32).astype(x.dtype)


def _weights(scale, beta, decay, segments: Int[Array, "B 1 N C"] | None) -> Weights:
    total = jnp.cumsum(decay, axis=-1)
    end = total[..., -1:]
    read, write, keep = jnp.exp(total), jnp.exp(end - total), jnp.exp(end)
    documents = None
    if segments is not None:
        read, write, keep = within_documents(segments, read, write, keep)
        documents = to_compare(segments[:, 0])
    tokens = jnp.stack([total, read, write, beta], axis=-2)
    return Weights(tokens, documents, keep[..., 0], scale)
