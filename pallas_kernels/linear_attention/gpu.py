"""Linear attention on Hopper GPUs by chunks of 64 tokens. bfloat16 inputs. Compiled for sm_90a and
run in JAX's interpreter; not yet run on hardware.

**One pass.** With G the running sum of the log decay in a chunk, outputs and every gradient are the
same contraction of three arrays with a state that travels over the chunks (gpu_kernel.py),

    pass(a, b, x):  y_i = scale * sum_{j <= i} exp(G_i - G_j) (a_i . b_j) x_j  +  read_i a_i S
                    S  <- keep S + sum_j write_j b_j x_j^T

with `read_i = scale exp(G_i)`, `write_j = exp(G_end - G_j)`, `keep = exp(G_end)`. In reverse, the
sum is over j >= i with exp(G_j - G_i), and read and write change places:

    o = pass(q, k, v)              dq = pass(do, v, k), its state being S^T
    dv = reverse pass(k, q, do)    dk = reverse pass(v, do, q), its state being dS^T

(Lightning Attention-2, https://arxiv.org/abs/2401.04658, algorithms 1 and 2.) Documents and
padding only change the weights: a pair in different documents, a read or write across a border,
and a kept state become 0. The log decay of token t has a part in all that passes it: with ' the
share that stays in the chunk and '' the share that reads or writes a state,

    sum_{i >= t} (dq_i . q_i - dk'_i . k_i) + sum_{j < t} dk''_j . k_j + keep <S_in, dS_out>

**Work.** A thread block takes one head and 64 columns of x and walks over the chunks. A pass at
K = V = 128 costs, per head and chunk, 64 kB of HBM traffic (three tiles in, one out) and, in two
blocks of which each forms its own a b^T,

    2 * (2 * 64 * 64 * 128  +  2 * 64 * 64 * 64  +  2 * (2 * 64 * 128 * 64))  =  7.3 MFLOP

On an H200 (4.8 TB/s, 990 Tflop/s) these are 13.7 ns and 7.4 ns of the whole chip: the traffic
bounds it, so a longer chunk, which saves state products, would gain nothing. Forward 1 pass,
backward 3. A gradient of the decay adds 96 kB per chunk (the state before it in bf16, written and
read, and two more tiles), and holds those states: twice q's bytes.

**Splits.** 264 blocks fill the chip's 132 SMs, but B H V / 64 may be far fewer (64 at one row of
32 heads), and each walks all T / 64 chunks in turn. Then T is cut into splits: one more pass
finds what each split adds to the state (b and x only, 32 kB per chunk), a product with the
[splits, splits] decays between them gives the state before each, and all splits run at once: 1.5
times the traffic of a forward for 264 / (B H V / 64) times the blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.documents import to_compare
from pallas_kernels.hopper import COLUMNS, C
from pallas_kernels.linear_attention.chunks import (
    decay_gradient,
    decay_of_tokens,
    in_chunks,
    within_documents,
)
from pallas_kernels.linear_attention.gpu_kernel import Weights, chunk_pass

BLOCKS = 264  # fill an H100 or H200: two on each of 132 SMs


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    del output_final_state  # it is at hand in any case
    hopper.refuse_target()
    _refuse_arguments(q, k, v, chunk_size)
    B, T, H, _ = q.shape
    K, V = q.shape[-1], v.shape[-1]
    decay = decay_of_tokens(decay, segments, (B, T, H))
    if segments is not None:
        segments = in_chunks(segments[..., None], C)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V))
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -T % C), (0, 0), (0, -x.shape[-1] % COLUMNS)])
    state = jnp.pad(initial_state.astype(jnp.float32),
                    [(0, 0), (0, 0), (0, -K % COLUMNS), (0, -V % COLUMNS)])
    o, state = _attend(scale, pad(q), pad(k), pad(v), in_chunks(decay, C), state, segments)
    return o[:, :T, :, :V], state[..., :K, :V]


def _refuse_arguments(q, k, v, chunk_size):
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 (float32 products would be tf32, 1e-3), "
                                  f"got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(q.shape[-1], v.shape[-1]) > 128:
        raise NotImplementedError(f"needs K and V up to 128 (a wider state leaves the registers), "
                                  f"got {q.shape[-1]} and {v.shape[-1]}")
    if chunk_size not in (None, C):
        raise NotImplementedError(f"works by chunks of {C}, got chunk_size {chunk_size}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, decay, initial_state, segments):
    return _forward(scale, q, k, v, decay, initial_state, segments)[0]


def _forward(scale, q, k, v, decay, initial_state, segments):
    weights = _weights(decay, segments, scale)
    incoming = _split(k, v, weights, initial_state)
    out = chunk_pass("o", q, k, v, weights, incoming)
    return (out["y"], out["state"][:, :, -1]), incoming


def _attend_fwd(scale, *arguments):
    q, k, v, decay, initial_state, segments = jax.tree.map(
        lambda x: x.value, arguments, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    out, incoming = _forward(scale, q, k, v, decay, initial_state, segments)
    wants_decay = () if arguments[3].perturbed else None  # the structure is known when tracing
    return out, (q, k, v, decay, segments, incoming, wants_decay)


def _attend_bwd(scale, residuals, gradients):
    q, k, v, decay, segments, incoming, wants_decay = residuals
    do = _dense(gradients[0], v.shape, v.dtype)
    dfinal = _dense(gradients[1], (*incoming.shape[:2], *incoming.shape[3:]), jnp.float32)
    weights = _weights(decay, segments, scale)
    backwards = weights.reversed()
    dincoming = _split(q, do, backwards, dfinal, incoming.shape[2])
    for_dv = chunk_pass("dv", k, q, do, backwards, dincoming)
    incoming, dincoming = incoming.mT, dincoming.mT
    if wants_decay is None:
        for_dq = chunk_pass("dq", do, v, k, weights, incoming)
        for_dk = chunk_pass("dk", v, do, q, backwards, dincoming)
        ddecay = None
    else:
        for_dq = chunk_pass("dq", do, v, k, weights, incoming, dot=q, emit=True)
        for_dk = chunk_pass(
            "dk", v, do, q, backwards, dincoming, dot=k, meet=for_dq["states"])
        written = for_dk["dots"][..., 0, :]
        within = for_dq["dots"][..., 1, :] - (for_dk["dots"][..., 1, :] - written)
        ddecay = decay_gradient(within, written, weights.keep * for_dk["meets"])
    return for_dq["y"], for_dk["y"], for_dv["y"], ddecay, for_dv["state"][:, :, 0], None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _dense(gradient, shape, dtype):
    return jnp.zeros(shape, dtype) if isinstance(gradient, SymbolicZero) else gradient


def _weights(decay, segments: Int[Array, "B 1 N C"] | None, scale) -> Weights:
    total = jnp.cumsum(decay, axis=-1)
    end = total[..., -1:]
    read, write, keep = scale * jnp.exp(total), jnp.exp(end - total), jnp.exp(end)
    documents = None
    if segments is not None:
        read, write, keep = within_documents(segments, read, write, keep)
        documents = to_compare(segments[:, 0])
    return Weights(jnp.stack([total, read, write], axis=-2), documents, keep[..., 0], scale)


def _split(b, x, weights, state, splits=None) -> Float[Array, "B H S K X"]:
    """The state before each split, in the direction of travel."""
    B, H, N = weights.keep.shape
    splits = splits or _splits(B * H * x.shape[-1] // COLUMNS, N)
    if splits == 1:
        return state[:, :, None]
    added = chunk_pass(
        "dstates" if weights.reverse else "states", None, b, x, weights, splits=splits)["state"]
    per = -(-N // splits)
    keep = jnp.pad(weights.keep, [(0, 0), (0, 0), (0, splits * per - N)], constant_values=1)
    keep = keep.reshape(B, H, splits, per).prod(-1)
    if weights.reverse:
        added, keep = added[:, :, ::-1], keep[:, :, ::-1]
    states = jnp.concatenate([state[:, :, None], added[:, :, :-1]], axis=2)
    at, source, between = jnp.ogrid[:splits, :splits, :splits]
    passes = (source <= between) & (between < at)
    decay = jnp.where(passes, keep[:, :, None, None], 1).prod(-1) * jnp.tri(splits)
    states = jnp.einsum("bhij,bhjkx->bhikx", decay, states, precision="highest")
    return states[:, :, ::-1] if weights.reverse else states


def _splits(blocks, N):
    if blocks >= BLOCKS // 2:
        return 1
    per = -(-N // min(BLOCKS // blocks, max(1, N // 4)))  # chunks: at least 4
    return -(-N // per)
