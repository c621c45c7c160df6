"""The passage of states over the chunks of a row on Hopper, forward and in reverse.

A thread block of one warpgroup takes one head and 64 columns of its state [K, 64], held in f32
registers, and walks over the chunks; TMA loads run a chunk ahead. See gpu.py for the equations.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.gated_delta_rule.gpu_chunks import READ, WRITE, Systems, Weights
from pallas_kernels.hopper import COLUMNS, C, across, load_f32, tile

STAGES = 2  # chunks on their way or at work


def forward(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    systems: Systems,
    weights: Weights,
    state: Float[Array, "B H K V"],
    *,
    keep_states: bool,
) -> dict[str, Array]:
    """From a state before the row.

    Returns:
      "state": [B H K V] f32, after the row.
      "o": [B T H V] bf16 the outputs; not if keep_states, but
      "e": [B T H V] bf16, what the tokens write, and
      "states": [B H N K V] bf16, before each chunk.
    """
    name = "states" if keep_states else "forward"
    return _walk_rows(name, q, k, systems, systems.u, weights, state, keep_states)


def reverse(q, k, systems, do, weights, dstate) -> dict[str, Array]:
    """The gradients of what `forward` keeps, from those of the outputs and of the last state.

    Returns: "state", that of the first state, "e", and "states", that after each chunk.
    """
    return _walk_rows("dstates", q, k, systems, do, weights, dstate, True, reverse=True)


def _walk_rows(name, q, k, systems, x, weights, state, keep_states, reverse=False):
    (B, T, H, V), K = x.shape, k.shape[-1]
    given = dict(q=q, k=k, w=systems.w, p=systems.p, x=x, tokens=weights.tokens,
                 keep=weights.keep, state=state)
    out = {"state": jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)}
    out["e" if keep_states else "o"] = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    if keep_states:
        out["states"] = jax.ShapeDtypeStruct((B, H, T // C, K, V), jnp.bfloat16)
    arriving = dict(q=tile(STAGES, C, K), k=tile(STAGES, C, K), w=tile(STAGES, C, K),
                    p=tile(STAGES, C, C), x=tile(STAGES, C, COLUMNS),
                    tokens=plgpu.SMEM((STAGES, 4, C), jnp.float32))
    if keep_states and not reverse:
        del given["q"], given["p"], arriving["q"], arriving["p"]
    shared = arriving | dict(
        state=tile(K, COLUMNS), e=tile(C, COLUMNS), weighted=tile(C, COLUMNS),
        arrived=plgpu.Barrier(num_arrivals=len(arriving), num_barriers=STAGES))
    return plgpu.kernel(
        functools.partial(_walk, scale=weights.scale, reverse=reverse, arriving=tuple(arriving)),
        out_type=out, scratch_types=(shared,), grid=(V // COLUMNS, B * H),
        grid_names=("column", "head"), compiler_params=hopper.COMPILER_PARAMS,
        kernel_name=f"gated_delta_rule_{name}")(given)


def _walk(given, out, smem, *, scale, reverse, arriving):
    """One thread block: a head, COLUMNS columns of the state, all chunks in turn."""
    _, H, N = given["keep"].shape
    column, head = lax.axis_index("column"), lax.axis_index("head")
    b, h = lax.div(head, jnp.int32(H)), lax.rem(head, jnp.int32(H))
    columns = pl.ds(column * COLUMNS, COLUMNS)
    chunk_at = lambda step: N - 1 - step if reverse else step

    def at(name, ref, chunk):
        tokens = pl.ds(chunk * C, C)
        match name:
            case "q" | "k" | "w":
                return ref.at[b, tokens, lax.div(h * ref.shape[2], jnp.int32(H))]
            case "x" | "o" | "e":
                return ref.at[b, tokens, h, columns]
            case "states":
                return ref.at[b, h, chunk, :, columns]
            case "tokens" | "p":
                return ref.at[b, h, chunk]

    def fetch(step):
        chunk, stage = chunk_at(step), lax.rem(step, STAGES)
        for name in arriving:
            plgpu.copy_gmem_to_smem(
                at(name, given[name], chunk), smem[name].at[stage], smem["arrived"].at[stage])

    def walk(step, state):
        chunk, stage = chunk_at(step), lax.rem(step, STAGES)
        plgpu.barrier_wait(smem["arrived"].at[stage])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what left before may be overwritten
        here = {name: smem[name].at[stage] for name in arriving}
        smem["state"][...] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()
        kept = state * given["keep"][b, h, chunk]
        advance = _back if reverse else _ahead
        state, o = advance(here, smem, kept, scale, "o" in out)
        if o is not None:
            smem["e"][...] = o.astype(jnp.bfloat16)
            plgpu.commit_smem()
        for name, source in dict(o="e", e="e", states="state").items():
            if name in out:
                plgpu.copy_smem_to_gmem(smem[source], at(name, out[name], chunk))
        pl.when(step + STAGES < N)(lambda: fetch(step + STAGES))
        return state

    for step in range(min(STAGES, N)):
        fetch(jnp.int32(step))
    at_ends = lambda ref: ref.at[b, h, :, columns]
    state = hopper.load(at_ends(given["state"]), optimized=False)
    at_ends(out["state"])[...] = lax.fori_loop(0, N, walk, state)
    plgpu.wait_smem_to_gmem(0)


def _ahead(here, smem, kept, scale, outputs):
    """E = u + w S, S' = keep S + K^T (write E), O = p E + scale read q S."""
    e = hopper.mma_add(load_f32(here["x"]), (here["w"], smem["state"]))
    _stage(smem, e, e * across(here["tokens"].at[WRITE]))
    state = hopper.mma_add(kept, (here["k"].T, smem["weighted"]))
    if not outputs:
        return state, None
    o = hopper.mma((C, COLUMNS), (here["q"], smem["state"]))
    o *= scale * across(here["tokens"].at[READ])
    return state, hopper.mma_add(o, (here["p"], smem["e"]))


def _back(here, smem, kept, scale, outputs):
    """dE = p^T dO + write K dS', dS = keep dS' + Q^T (scale read dO) + w^T dE."""
    del outputs
    de = hopper.mma((C, COLUMNS), (here["k"], smem["state"])) * across(here["tokens"].at[WRITE])
    de = hopper.mma_add(de, (here["p"].T, here["x"]))
    _stage(smem, de, load_f32(here["x"]) * (scale * across(here["tokens"].at[READ])))
    return hopper.mma_add(
        kept, (here["q"].T, smem["weighted"]), (here["w"].T, smem["e"])), None


def _stage(smem, e, weighted):
    smem["e"][...] = e.astype(jnp.bfloat16)
    smem["weighted"][...] = weighted.astype(jnp.bfloat16)
    plgpu.commit_smem()
