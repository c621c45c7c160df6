"""The gated delta rule by chunks on TPU: the kernels of `tpu_kernels.py` as one function.

What decays and documents contribute is worked out here, a few numbers per token and head, and
given to the kernels as weights. They take q, k, v as `[B, T, H K]`, heads as lanes: no array is
transposed on the way in or out.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import refuse_traced
from pallas_kernels.dispatch import target_platform
from pallas_kernels.documents import at_borders, cut_at_borders, first_of_document
from pallas_kernels.gated_delta_rule import tpu_kernels, xla
from pallas_kernels.gated_delta_rule.chunks import running_sums
from pallas_kernels.gated_delta_rule.tpu_kernels import Plan
from pallas_kernels.mosaic_tpu import LANES, flat


def gated_delta_rule(q, k, v, beta, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    if target_platform() != "tpu":
        raise NotImplementedError(f"serves TPU only, the target is {target_platform()}")
    (B, T, Hq, K), Hk, (H, V) = q.shape, k.shape[2], v.shape[2:]
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"needs v in bfloat16 or float32, got {v.dtype}")
    refuse_traced(scale)
    if T <= xla.FEW:  # one by one, as there
        return xla.gated_delta_rule(
            q, k, v, beta, decay, scale=scale, initial_state=initial_state, segments=segments,
            output_final_state=output_final_state, chunk_size=chunk_size)
    plan = _plan(q, k, v, scale, segments, chunk_size)
    groups = H // plan.heads
    q = jnp.repeat(q, plan.queries * groups // Hq, axis=2)
    k = jnp.repeat(k, plan.keys * groups // Hk, axis=2)
    # A product of the matrix unit rounds to v's dtype whatever it is given.
    arrays = [flat(x.astype(v.dtype), plan.block) for x in (q, k, v)]
    padded = lambda x: jnp.pad(x, ((0, 0), (0, -T % plan.block), (0, 0))).astype(jnp.float32)
    decay = jnp.zeros_like(beta) if decay is None else decay
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), jnp.float32)
    initial_state = jnp.pad(initial_state.astype(jnp.float32),
                            ((0, 0), (0, 0), (0, -K % LANES), (0, -V % LANES)))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, -T % plan.block)))
    o, state = _rule(plan, *arrays, padded(beta), padded(decay), initial_state, segments)
    o = o.reshape(B, o.shape[1], -1, V + -V % LANES)[:, :T, :, :V]
    return o, state[..., :K, :V]


def _plan(q, k, v, scale, segments, chunk_size):
    (T, Hq, K), Hk, (H, V) = q.shape[1:], k.shape[2], v.shape[2:]
    chunk = chunk_size or min(128, max(16, 1 << (T - 1).bit_length()))
    if chunk not in (16, 32, 64, 128):
        raise NotImplementedError(f"needs chunk_size 16, 32, 64 or 128, got {chunk}")
    # Four heads hide the latencies; more tokens than 256 hide little more and compile for longer.
    most = 4 if v.dtype == jnp.bfloat16 else 2
    most = max(1, most // (-(-K // LANES) * -(-V // LANES)))
    heads = max(n for n in range(1, most + 1) if H % n == 0)
    chunks = min(2, -(-T // chunk))
    return Plan(heads, _per_step(Hk, heads, H), _per_step(Hq, heads, H), chunk, chunks,
                float(scale), segments is not None, v.dtype == jnp.float32)


def _per_step(shared, heads, H):
    """How many of the queries' or keys' heads go with `heads` of H in a grid step."""
    if heads * shared % H == 0:
        return heads * shared // H
    return 1 if H // shared % heads == 0 else heads


def _weights(plan, beta, decay, segments):
    """beta, decay and documents as the kernels read them: rows [B, N, H / heads, rows, C]."""
    in_chunks = lambda x: jnp.moveaxis(x.reshape(len(x), -1, plan.chunk, x.shape[-1]), 2, 3)
    beta, decay = in_chunks(beta), in_chunks(decay)  # [B, N, H, C]
    if segments is not None:
        tokens = in_chunks(segments[..., None])
        decay = jnp.where(tokens != 0, decay, 0)
    total, rest = running_sums(decay)
    left = (total[..., -1:] - total) + (rest[..., -1:] - rest)
    read, write = jnp.exp(total + rest), jnp.exp(left)
    keep = read[..., -1:]
    if segments is not None:
        before, after = (x[..., None, None] for x in at_borders(segments, plan.chunk))
        read, write, keep = cut_at_borders(tokens, before, after, read, write, keep)
    groups = [beta, read, write, beta * write, jnp.broadcast_to(keep, read.shape)]
    groups += [total, rest] if plan.exact else [total + rest]
    rows = jnp.stack(groups, axis=2)  # [B, N, groups, H, C]
    B, N, _, H, C = rows.shape
    rows = jnp.moveaxis(rows.reshape(B, N, len(groups), H // plan.heads, plan.heads, C), 2, 3)
    rows = rows.reshape(B, N, H // plan.heads, -1, C)
    if segments is not None:
        first = jnp.broadcast_to(first_of_document(tokens)[..., None, :],
                                 (*rows.shape[:3], 1, C))
        rows = jnp.concatenate([rows, first], axis=3)
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(plan, q, k, v, beta, decay, initial_state, segments):
    rows = _weights(plan, beta, decay, segments)
    return tpu_kernels.forward(plan, rows, q, k, v, initial_state, keep_states=False)


def _rule_forward(plan, q, k, v, beta, decay, initial_state, segments):
    rows = _weights(plan, beta, decay, segments)
    o, state, states = tpu_kernels.forward(plan, rows, q, k, v, initial_state, keep_states=True)
    return (o, state), (q, k, v, rows, states, segments)


def _rule_backward(plan, saved, gradients):
    q, k, v, rows, states, segments = saved
    *gradients, dweights, dstate = tpu_kernels.backward(plan, rows, q, k, v, *gradients, states)
    return *gradients, *_gate_gradients(plan, dweights, segments), dstate, None


def _gate_gradients(plan, dweights, segments):
    """Those of beta and of the decay, [B, T, H], from the kernel's rows.

    As in `xla.py`: a token's decay is part of all that reaches it or later ones, and of what
    earlier ones write to the outgoing state.
    """
    B, N, G, _, C = dweights.shape
    dweights = dweights.reshape(B, N, G, 3, plan.heads, C)
    dbeta, reaching, write = (
        dweights[:, :, :, i].transpose(0, 1, 4, 2, 3).reshape(B, N, C, -1) for i in range(3))
    later = jnp.flip(jnp.cumsum(jnp.flip(reaching, 2), axis=2), 2)
    ddecay = later + (jnp.cumsum(write, axis=2) - write)
    dbeta, ddecay = (x.reshape(B, N * C, -1) for x in (dbeta, ddecay))
    if segments is not None:  # the decay of padding is not used
        ddecay = jnp.where(segments[..., None] != 0, ddecay, 0)
    return dbeta, ddecay


_rule.defvjp(_rule_forward, _rule_backward)
