"""Linear attention by chunks on TPU: the Pallas Mosaic kernels of `tpu_kernels.py` as one function.

What decays and documents contribute is worked out here, a few numbers per token and head, and
given to the kernels as weights. They take q, k, v as `[B, T, H K]`, heads as lanes: no array is
transposed on the way in or out.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.arguments import refuse_traced
from pallas_kernels.dispatch import target_platform
from pallas_kernels.documents import first_of_document
from pallas_kernels.linear_attention import tpu_kernels
from pallas_kernels.linear_attention.chunks import (
    decay_gradient,
    in_chunks,
    running_sum,
    within_documents,
)
from pallas_kernels.linear_attention.tpu_kernels import Plan
from pallas_kernels.mosaic_tpu import LANES, flat


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
    refuse_traced(scale)
    plan = _plan(T, H, K, V, q.dtype, scale, decay, segments, chunk_size)
    padded = [flat(x, plan.block) for x in (q, k, v)]
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), jnp.float32)
    initial_state = jnp.pad(initial_state.astype(jnp.float32),
                            ((0, 0), (0, 0), (0, -K % LANES), (0, -V % LANES)))
    decays, total, rest = _running_decay(decay, plan, T, segments)
    weights = _weights(plan, lax.stop_gradient(decay), lax.stop_gradient(total), rest, segments)
    o, state = _attend(plan, *padded, initial_state, jnp.asarray(decays), weights)
    return o.reshape(B, -1, H, V + -V % LANES)[:, :T, :, :V], state[..., :K, :V]


def _plan(T, H, K, V, dtype, scale, decay, segments, chunk_size):
    chunk = chunk_size or min(128, max(16, 1 << (T - 1).bit_length()))
    if chunk % 16 or chunk > 256:
        raise NotImplementedError(f"needs chunk_size a multiple of 16 up to 256, got {chunk}")
    # 512 tokens of 4 heads hide the latencies; float32 has six times the matrix products.
    most_chunks, most_heads = (4, 4) if dtype == jnp.bfloat16 else (2, 2)
    if max(K, V) > LANES:
        most_heads //= 2
    heads = max(n for n in range(1, most_heads + 1) if H % n == 0)
    chunks = min(most_chunks, max(1, 128 * most_chunks // chunk), math.ceil(T / chunk))
    return Plan(heads, chunk, chunks, scale, decay.ndim == 3, segments is not None,
                dtype == jnp.float32)


def _running_decay(decay, plan, T, segments):
    """The log decays of tokens [B, H, N, C], their running sum in each chunk, and its rounding.

    B is 1 if all rows agree.
    """
    C, padded = plan.chunk, T + -T % plan.block
    real = np.arange(padded) < T
    if segments is not None:
        real = jnp.pad(segments != 0, ((0, 0), (0, padded - T)))
    real = real.reshape(-1, 1, padded // C, C)
    if decay.ndim == 1:
        xp = np if segments is None else jnp
        decay = decay.astype(np.float32)[:, None, None]
        return decay * real, decay * xp.cumsum(real, axis=-1), np.zeros(1, np.float32)
    decay = in_chunks(jnp.pad(decay.astype(jnp.float32), ((0, 0), (0, padded - T), (0, 0))), C)
    decay = jnp.where(real, decay, 0)
    return decay, *running_sum(decay)


def _weights(plan, decay, total, rest, segments):
    """Decay and documents as the kernels read them: rows [B, N, H / heads, rows, C], D [H, C, C].

    D is None for a decay per token: the kernels take it from the running sums.
    """
    end = total[..., -1:]
    lost = rest[..., -1:] - rest
    read, write, keep = jnp.exp(total), jnp.exp((end - total) + lost), jnp.exp(end)
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, total.shape[2] * plan.chunk - segments.shape[1])))
        segments = in_chunks(segments[..., None], plan.chunk)
        read, write, keep = within_documents(segments, read, write, keep)
    groups = [plan.scale * read, write, jnp.broadcast_to(keep, write.shape)]
    if plan.token_decay:
        groups += [total, rest] if plan.exact else [total]
    rows = jnp.stack(groups)  # [groups, B, H, N, C]
    rows = rows.reshape(*rows.shape[:2], -1, plan.heads, *rows.shape[3:])
    rows = rows.transpose(1, 4, 2, 0, 3, 5)
    rows = rows.reshape(*rows.shape[:3], -1, plan.chunk)
    if plan.packed:
        first = jnp.moveaxis(first_of_document(segments), 1, 2)[:, :, None]
        first = jnp.broadcast_to(first, (*rows.shape[:3], 1, plan.chunk))
        rows = jnp.concatenate([rows, first], axis=3)
    if plan.token_decay:
        return rows, None
    i = np.arange(plan.chunk)
    distance = i[:, None] - i
    decay = decay.astype(jnp.float32)[:, None, None]
    return rows, plan.scale * jnp.exp(jnp.where(distance >= 0, decay * distance, -jnp.inf))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, initial_state, decays, weights):
    del decays  # a name for their gradient
    return tpu_kernels.forward(plan, q, k, v, initial_state, weights, keep_states=False)


def _attend_forward(plan, q, k, v, initial_state, decays, weights):
    perturbed = decays.perturbed
    q, k, v, initial_state, decays = (x.value for x in (q, k, v, initial_state, decays))
    weights = jax.tree.map(lambda x: x.value, weights)
    o, state, states = tpu_kernels.forward(plan, q, k, v, initial_state, weights, keep_states=True)
    rows = decays.shape[:1] if perturbed else None
    return (o, state), (q, k, v, states, weights, jnp.zeros(rows) if perturbed else None)


def _attend_backward(plan, kept, gradients):
    q, k, v, states, weights, rows = kept
    do, dstate = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
                  for x in gradients)
    dq, dk, dv, dstate, *passed = tpu_kernels.backward(
        plan, q, k, v, do, dstate, states, weights, decay_gradient=rows is not None)
    if rows is None:
        return dq, dk, dv, dstate, None, None
    [passed] = passed
    B, N, G, _, C = passed.shape
    passed = passed.reshape(B, N, G, 3, plan.heads, C).transpose(3, 0, 2, 4, 1, 5)
    within, written, through = passed.reshape(3, B, G * plan.heads, N, C)
    ddecays = decay_gradient(within, written, through[..., 0])
    if len(rows) < B:
        ddecays = ddecays.sum(0, keepdims=True)
    return dq, dk, dv, dstate, ddecays, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
