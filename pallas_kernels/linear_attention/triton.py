"""Linear attention on NVIDIA GPUs from Ampere on, by chunks, in Triton through jax-triton. Compiled
for sm_80 and run in Triton's interpreter; not yet run on hardware.

With G the running sum of the log decay in a chunk, outputs and every gradient come from two
contractions (triton_kernels.py): of keys and values into the states S before each chunk, and

    y_i = scale * sum_{j <= i} exp(G_i - G_j) (a_i . b_j) x_j  +  read_i a_i S

    o = outputs(q, k, v; S)               S = states(k, v)
    dq = outputs(do, v, k; S^T)           dS = reverse states(q, do)
    dv = reverse outputs(k, q, do; dS)    dk = reverse outputs(v, do, q; dS^T)

(Lightning Attention-2, https://arxiv.org/abs/2401.04658, algorithms 1 and 2.) Documents and
padding only change the weights: a pair in different documents, a read or write across a border,
and a kept state become 0. The log decay of token t has a part in all that passes it: with ' the
share that stays in the chunk and '' the share that reads or writes a state,

    sum_{i >= t} (dq'_i . q_i + dq''_i . q_i - dk'_i . k_i) + sum_{j < t} dk''_j . k_j
        + keep <S_in, dS_out>

States are in memory in the inputs' dtype, K V / C numbers per token and head: written and read in
the forward, and computed again in the backward pass, which keeps nothing but its inputs.
"""

import functools
import re

import jax
import jax.numpy as jnp
import jax_triton
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Int

from pallas_kernels.arguments import refuse_traced
from pallas_kernels.dispatch import target_kind, target_platform
from pallas_kernels.documents import to_compare
from pallas_kernels.linear_attention.chunks import (
    decay_gradient,
    decay_of_tokens,
    in_chunks,
    running_sum,
    within_documents,
)
from pallas_kernels.linear_attention.triton_kernels import LEAST, SIDE, Weights, outputs, states

_OLDER = r"\b(GTX|TITAN|RTX 20\d\d|T4|V100)\b"  # NVIDIA's with no products of bfloat16


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    del output_final_state  # it is at hand in any case
    _refuse_target()
    _refuse_arguments(q, k, v, scale, chunk_size)
    B, T, H, K = q.shape
    chunk = chunk_size or min(SIDE[q.dtype.name], max(LEAST, 1 << (T - 1).bit_length()))
    decay = decay_of_tokens(decay, segments, (B, T, H))
    if segments is not None:
        segments = in_chunks(segments[..., None], chunk)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, v.shape[-1]))
    return _attend(
        scale, q, k, v, in_chunks(decay, chunk), initial_state.astype(jnp.float32), segments)


def _refuse_target():
    if target_platform() != "gpu":
        raise NotImplementedError(f"serves GPU only, the target is {target_platform()}")
    kind = target_kind()
    if not kind.startswith("NVIDIA") or re.search(_OLDER, kind):
        raise NotImplementedError(
            f"serves NVIDIA GPUs of compute capability 8.0 and more, the target is {kind}")
    if jax.__version_info__ >= (0, 12) and jax_triton.__version_info__ <= (0, 4, 1):
        raise NotImplementedError(
            f"jax-triton {jax_triton.__version__} cannot lower under jax {jax.__version__}: "
            "needs jax 0.10 or 0.11")


def _refuse_arguments(q, k, v, scale, chunk_size):
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"needs q, k, v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    refuse_traced(scale)
    if chunk_size not in (None, 16, 32, 64):
        raise NotImplementedError(f"works by chunks of 16, 32 or 64, got chunk_size {chunk_size}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, decay, initial_state, segments):
    weights = _weights(decay, segments, scale)
    before, final = states("states", k, v, weights, initial_state)
    return outputs("o", q, k, v, weights, before)[0], final


def _attend_fwd(scale, *arguments):
    values = jax.tree.map(
        lambda x: x.value, arguments, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    wants_decay = () if arguments[3].perturbed else None  # the structure is known when tracing
    return _attend(scale, *values), (values, wants_decay)


def _attend_bwd(scale, residuals, gradients):
    (q, k, v, decay, initial_state, segments), wants_decay = residuals
    do, dfinal = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in gradients)
    weights = _weights(decay, segments, scale)
    backwards = weights._replace(reverse=True)
    before, _ = states("states", k, v, weights, initial_state)
    dafter, dinitial = states("dstates", q, do, backwards, dfinal)
    dotted = lambda x: None if wants_decay is None else x
    dq, q_dots = outputs("dq", do, v, k, weights, before, transposed=True, dot=dotted(q))
    dk, k_dots = outputs("dk", v, do, q, backwards, dafter, transposed=True, dot=dotted(k))
    dv, _ = outputs("dv", k, q, do, backwards, dafter)
    ddecay = None
    if wants_decay is not None:
        ddecay = _ddecay(q_dots, k_dots, weights.keep, before, dafter)
    return dq, dk, dv, ddecay, dinitial, None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _ddecay(q_dots, k_dots, keep, before, dafter):
    (read, q_pairs), (write, k_pairs) = q_dots, k_dots
    through = keep * (before.astype(jnp.float32) * dafter.astype(jnp.float32)).sum((-2, -1))
    return decay_gradient(read + q_pairs - k_pairs, write, through)


def _weights(decay, segments: Int[Array, "B 1 N C"] | None, scale) -> Weights:
    total, rest = running_sum(decay)
    end = total[..., -1:]
    left = (end - total) + (rest[..., -1:] - rest)
    read, write, keep = scale * jnp.exp(total), jnp.exp(left), jnp.exp(end)
    documents = None
    if segments is not None:
        read, write, keep = within_documents(segments, read, write, keep)
        documents = to_compare(segments[:, 0])
    return Weights(jnp.stack([total, rest, read, write], axis=-2), documents, keep[..., 0], scale)
