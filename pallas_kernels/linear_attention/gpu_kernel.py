"""The chunk pass on Hopper (wgmma, TMA): what gpu.py builds outputs and gradients from.

    y_i = scale * sum_{j <= i} exp(G_i - G_j) (a_i . b_j) x_j  +  read_i a_i S
    S  <- keep S + sum_j write_j b_j x_j^T

A thread block of one warpgroup takes one head and 64 columns of x, holds the state [K, 64] in f32
registers (64 of a thread's at K = 128) and walks over the chunks of its split; TMA loads run a
chunk ahead. Two blocks fit in an SM and hide each other's waits (one of dq and dk, where K or V is
128 and the decay wants a gradient): docs/results/static_kernels_gpu.md. Operands of wgmma are bf16
(the state and the weighted x are rounded for them), sums f32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.hopper import COLUMNS, LAYOUT, C, across, down, load_f32, tile

STAGES = 2  # chunks on their way or at work


class Weights(NamedTuple):
    """What decay and documents contribute, and the direction of travel."""

    tokens: Float[Array, "B H N 3 C"]  # the running decay; of a token, reading and writing
    documents: Int[Array, "B N 2 C"] | None  # of tokens i and j; those of padding equal none
    keep: Float[Array, "B H N"]
    scale: float
    reverse: bool = False

    def reversed(self):
        return self._replace(tokens=self.tokens[..., jnp.array([0, 2, 1]), :], reverse=True)


def chunk_pass(
    name: str,
    a: Float[Array, "B T H K"] | None,
    b: Float[Array, "B T H K"],
    x: Float[Array, "B T H X"],
    weights: Weights,
    state: Float[Array, "B H S K X"] | None = None,
    *,
    splits: int | None = None,
    dot: Float[Array, "B T H X"] | None = None,
    emit: bool = False,
    meet: Float[Array, "B H N K X"] | None = None,
) -> dict[str, Array]:
    """One pass over chunks, all splits at once. T is a multiple of C, K and X are 64 or 128.

    Args:
      name: of the kernel, in profiles.
      a: None computes the state only.
      state: before each split, in the direction of travel; None begins at 0 in `splits` splits.

    Returns:
      "state": [B H S K X] f32, after each split.
      "y": [B T H X] bf16, if there is an a.
      "dots": [B H N 2 C] f32 if there is a dot: its products with y_i's part from the state, and
        with y_i; both without x_i's own part in y_i, which no decay touches.
      "states": [B H N K X] bf16 if emit: the state before each chunk.
      "meets": [B H N] f32 if there is a meet: its product with the state before each chunk.
    """
    B, T, H, K = b.shape
    X, N = x.shape[-1], T // C
    S = splits or state.shape[2]
    given = dict(a=a, b=b, x=x, dot=dot, meet=meet, tokens=weights.tokens, keep=weights.keep,
                 documents=None if a is None else weights.documents, state=state)
    given = {name: array for name, array in given.items() if array is not None}
    shape = jax.ShapeDtypeStruct
    out = {"state": shape((B, H, S, K, X), jnp.float32)}
    if a is not None:
        out["y"] = shape(x.shape, jnp.bfloat16)
    if dot is not None:
        out["dots"] = shape((B, H, N, X // COLUMNS, 2, C), jnp.float32)
    if emit:
        out["states"] = shape((B, H, N, K, X), jnp.bfloat16)
    if meet is not None:
        out["meets"] = shape((B, H, N, X // COLUMNS, K), jnp.float32)
    out = plgpu.kernel(
        functools.partial(_walk, scale=weights.scale, reverse=weights.reverse),
        out_type=out,
        scratch_types=(_shared_memory(given, out, K),),
        grid=(X // COLUMNS, B * H, S), grid_names=("column", "head", "split"),
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name=f"linear_attention_{name}",
    )(given)
    for name, axes in dict(dots=3, meets=(3, 4)).items():
        if name in out:
            out[name] = out[name].sum(axes)
    return out


def _shared_memory(given, out, K):
    tiles = dict(a=(C, K), b=(C, K), x=(C, COLUMNS), dot=(C, COLUMNS), meet=(K, COLUMNS))
    arriving = {name: tile(STAGES, *shape) for name, shape in tiles.items() if name in given}
    arriving["tokens"] = plgpu.SMEM((STAGES, 3, C), jnp.float32)
    if "documents" in given:
        arriving["documents"] = plgpu.SMEM((STAGES, 2, C), jnp.int32)
    leaving = {name: plgpu.SMEM(out[name].shape[4:], jnp.float32)
               for name in ("dots", "meets") if name in out}
    return arriving | leaving | dict(
        staged=tile(C, COLUMNS),  # the weighted x, then y
        bf16_state=tile(K, COLUMNS),
        arrived=plgpu.Barrier(num_arrivals=len(arriving), num_barriers=STAGES))


def _walk(given, out, smem, *, scale, reverse):
    """One thread block: a head, COLUMNS columns of x, the chunks of a split in turn."""
    _, H, N = given["keep"].shape
    K = given["b"].shape[-1]
    column, head, split = (lax.axis_index(name) for name in ("column", "head", "split"))
    b, h = lax.div(head, jnp.int32(H)), lax.rem(head, jnp.int32(H))
    columns = pl.ds(column * COLUMNS, COLUMNS)
    chunks = -(-N // out["state"].shape[2])
    count = jnp.minimum(chunks, N - split * chunks)
    chunk_at = lambda step: split * chunks + (count - 1 - step if reverse else step)

    arriving = [name for name in smem if name in given]

    def fetch(step):
        chunk, stage = chunk_at(step), lax.rem(step, STAGES)
        for name in arriving:
            part = _part(name, given[name], b, h, chunk, columns)
            plgpu.copy_gmem_to_smem(part, smem[name].at[stage], smem["arrived"].at[stage])

    def walk(step, state):
        chunk, stage = chunk_at(step), lax.rem(step, STAGES)
        plgpu.barrier_wait(smem["arrived"].at[stage])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what left before may be overwritten
        here = {name: smem[name].at[stage] for name in arriving}
        keep = given["keep"][b, h, chunk]
        if "y" in out:
            smem["bf16_state"][...] = state.astype(jnp.bfloat16)
        weighted = load_f32(here["x"]) * across(here["tokens"].at[2])
        smem["staged"][...] = weighted.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if "meets" in out:
            smem["meets"][...] = (state * load_f32(here["meet"])).sum(1)
        if "y" in out:
            y = _outputs(here, smem, scale, reverse)
        state = hopper.mma_add(state * keep, (here["b"].transpose((1, 0)), smem["staged"]))
        if "y" in out:
            smem["staged"][...] = y.astype(jnp.bfloat16)
            plgpu.commit_smem()
            tokens = pl.ds(chunk * C, C)
            plgpu.copy_smem_to_gmem(smem["staged"], out["y"].at[b, tokens, h, columns])
            if "states" in out:
                plgpu.copy_smem_to_gmem(
                    smem["bf16_state"], out["states"].at[b, h, chunk, :, columns])
            for name in ("dots", "meets"):
                if name in out:
                    plgpu.copy_smem_to_gmem(smem[name], out[name].at[b, h, chunk, column])
        pl.when(step + STAGES < count)(lambda: fetch(step + STAGES))
        return state

    for step in range(STAGES):
        pl.when(step < count)(functools.partial(fetch, jnp.int32(step)))
    if "state" in given:
        state = hopper.load(given["state"].at[b, h, split, :, columns], optimized=False)
    else:
        state = plgpu.layout_cast(jnp.zeros((K, COLUMNS), jnp.float32), LAYOUT)
    out["state"][b, h, split, :, columns] = lax.fori_loop(0, count, walk, state)
    plgpu.wait_smem_to_gmem(0)


def _part(name, ref, b, h, chunk, columns):
    tokens = pl.ds(chunk * C, C)
    match name:
        case "a" | "b":
            return ref.at[b, tokens, h]
        case "x" | "dot":
            return ref.at[b, tokens, h, columns]
        case "meet":
            return ref.at[b, h, chunk, :, columns]
        case "tokens":
            return ref.at[b, h, chunk]
        case "documents":
            return ref.at[b, chunk]


def _outputs(here, smem, scale, reverse):
    """y of a chunk, f32 [C, COLUMNS]. The order of its parts is what keeps registers free."""
    y = hopper.mma((C, COLUMNS), (here["a"], smem["bf16_state"])) * across(here["tokens"].at[1])
    _dot(y, here, smem, 0)
    pairs, own = _pairs(here, scale, reverse, apart="dot" in here)
    y = hopper.mma_add(y, (pairs, here["x"]))
    _dot(y, here, smem, 1)
    if own is not None:
        y += lax.broadcast_in_dim(own, y.shape, [0]) * load_f32(here["x"])
    return y


def _dot(y, here, smem, part):
    if "dot" in here:
        smem["dots"][part] = (y * load_f32(here["dot"])).sum(1)


def _pairs(here, scale, reverse, apart):
    """The weights of x_j in y_i, bf16 [C, C]; if apart, the diagonal is 0 there and given [C]."""
    pairs = scale * hopper.mma((C, C), (here["a"], here["b"].transpose((1, 0))))
    i, j = hopper.indices()
    decay = across(here["tokens"].at[0]) - down(here["tokens"].at[0])
    seen, decay = (i <= j, -decay) if reverse else (i >= j, decay)
    if "documents" in here:
        seen &= across(here["documents"].at[0]) == down(here["documents"].at[1])
    own = None
    if apart:
        own = jnp.where(seen & (i == j), pairs, 0).sum(1)
        seen &= i != j
    pairs *= jnp.exp(jnp.where(seen, decay, 0))
    return jnp.where(seen, pairs, 0).astype(jnp.bfloat16), own
