"""Streaming top-k of chunks on Hopper GPUs: a Pallas Mosaic kernel; its gradient is that of every
form. bfloat16 inputs. Compiled for sm_90a and run in JAX's interpreter; not yet run on hardware.

A thread block of one warpgroup scores 64 landmarks at a time for its 64 queries, which are rows,
and keeps the k best so far in registers. While some query's best new score beats the least it
keeps, every query that has such a score takes it in for that least one: the first block needs k
such passes, later ones few. Blocks that no query of the tile may choose from are not scored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.arguments import refuse_traced
from pallas_kernels.chunk_topk.gradient import with_gradient
from pallas_kernels.chunk_topk.limits import refuse_sizes
from pallas_kernels.chunk_topk.noise import gumbel
from pallas_kernels.chunk_topk.xla import latest_first
from pallas_kernels.hopper import COLS, COLUMNS, LAYOUT, ROWS, C, tile

STAGES = 4  # parts of landmarks on their way or at work
_LARGEST_WIDTH = 1024  # of queries in shared memory
_LARGEST_K = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernel is built."""

    k: int
    scale: float


def chunk_topk(q, landmarks, ended, segments, chunk_segments, words, *, k, scale):
    hopper.refuse_target()
    if not q.dtype == landmarks.dtype == jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 (float32 products would be tf32, 1e-3), "
                                  f"got {q.dtype} and {landmarks.dtype}")
    refuse_traced(scale)
    refuse_sizes(landmarks, k, widest=_LARGEST_WIDTH, largest_k=_LARGEST_K)
    choose = functools.partial(_choose, Plan(k, float(scale)))
    return with_gradient(choose, scale, q, landmarks, (ended, segments, chunk_segments, words))


def _choose(plan, q, landmarks, ended, segments, chunk_segments, words):
    (B, T, G, R), N = q.shape, landmarks.shape[1]
    ended = _padded(jnp.minimum(ended, N))
    tiles = ended.shape[1] // C
    given = dict(q=_padded(q, COLUMNS), landmarks=_padded(landmarks, COLUMNS), ended=ended,
                 # How many blocks hold a chunk that some query of a tile may choose.
                 blocks=-(-ended.reshape(B, tiles, C).max(2) // C))
    if segments is not None:
        given |= dict(segments=_padded(segments), chunk_segments=_padded(chunk_segments))
    if words is not None:
        given["words"] = jnp.swapaxes(_padded(words), 1, 2)
    shape, R = (B, G, tiles, C, plan.k + -plan.k % 8), given["q"].shape[-1]
    choice, indices = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
        scratch_types=(dict(
            q=tile(C, R), landmarks=tile(STAGES, C, COLUMNS), asked=plgpu.Barrier(),
            arrived=plgpu.Barrier(num_barriers=STAGES)),),
        grid=(B * G, tiles), grid_names=("group", "tile"),
        compiler_params=hopper.COMPILER_PARAMS, kernel_name="chunk_topk")(given)
    choice, indices = (
        jnp.moveaxis(x.reshape(B, G, tiles * C, -1)[:, :, :T, :plan.k], 1, 2)
        for x in (choice, indices))
    return latest_first(choice, indices, words)


def _padded(x, columns=1):
    """Rows and columns of zeros, up to whole tiles."""
    widths = [(0, 0), (0, -x.shape[1] % C), *[(0, 0)] * (x.ndim - 2)]
    if columns > 1:
        widths[-1] = 0, -x.shape[-1] % columns
    return jnp.pad(x, widths)


def _kernel(plan, given, choice_ref, indices_ref, smem):
    G, R = given["q"].shape[2:]
    group, n = lax.axis_index("group"), lax.axis_index("tile")
    n = given["blocks"].shape[1] - 1 - n  # those with the most to choose from begin
    b, g = lax.div(group, jnp.int32(G)), lax.rem(group, jnp.int32(G))
    parts, queries = R // COLUMNS, pl.ds(n * C, C)
    blocks = given["blocks"][b, n]

    def fetch(step):
        stage = lax.rem(step, STAGES)
        chunks = pl.ds(lax.div(step, jnp.int32(parts)) * C, C)
        columns = pl.ds(lax.rem(step, jnp.int32(parts)) * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(given["landmarks"].at[b, chunks, g, columns],
                                smem["landmarks"].at[stage], smem["arrived"].at[stage])

    def of_queries(name, *at):
        return hopper.load(given[name].at[*at, queries], ROWS, optimized=False)

    def block(i, best):
        def part(p, scores):
            step = i * parts + p
            stage = lax.rem(step, STAGES)
            plgpu.barrier_wait(smem["arrived"].at[stage])
            q = smem["q"].at[:, pl.ds(p * COLUMNS, COLUMNS)]
            scores = hopper.mma_add(scores, (q, smem["landmarks"].at[stage].T))
            pl.when(step + STAGES < blocks * parts)(lambda: fetch(step + STAGES))
            return scores

        scores = plgpu.layout_cast(jnp.zeros((C, C), jnp.float32), LAYOUT)
        choice = plan.scale * lax.fori_loop(0, parts, part, scores)
        ids = i * C + hopper.indices()[1]
        if "words" in given:
            choice += gumbel(_across(words, C), ids)
        visible = ids < _across(ended, C)
        if "segments" in given:
            chunks = given["chunk_segments"].at[b, pl.ds(i * C, C)]
            chunks = hopper.load(chunks, COLS, optimized=False)
            visible &= lax.broadcast_in_dim(chunks, (C, C), [1]) == _across(segments, C)
        return _merge(jnp.where(visible, choice, -jnp.inf), ids, *best)

    plgpu.copy_gmem_to_smem(given["q"].at[b, queries, g], smem["q"], smem["asked"])
    for step in range(STAGES):
        pl.when(step < blocks * parts)(functools.partial(fetch, jnp.int32(step)))
    ended = of_queries("ended", b)
    words = of_queries("words", b, g) if "words" in given else None
    segments = of_queries("segments", b) if "segments" in given else None
    plgpu.barrier_wait(smem["asked"])
    slot = plgpu.broadcasted_iota(jnp.int32, choice_ref.shape[3:], 1, layout=LAYOUT)
    # Slots beyond k count as too good to be replaced; ids of empty ones differ.
    best = jnp.where(slot < plan.k, -jnp.inf, jnp.inf), -1 - slot
    choice_ref[b, g, n], indices_ref[b, g, n] = lax.fori_loop(0, blocks, block, best)


def _merge(choice, ids, best, best_ids):
    """The best of both: of equal ones the later, and those of `choice` are later."""
    width = best.shape[1]

    def beats(state):
        _, largest, best, _ = state
        better = (largest > -jnp.inf) & (largest >= best.min(1))
        return jnp.where(better, 1, 0).max() > 0

    def take(state):
        choice, largest, best, best_ids = state
        latest = jnp.where(choice == _across(largest, C), ids, -1).max(1)
        least = best.min(1)
        oldest = jnp.where(best == _across(least, width), best_ids, 2**31 - 1).min(1)
        better = (largest > least) | ((largest == least) & (latest > oldest))
        better &= largest > -jnp.inf
        goes = (best_ids == _across(oldest, width)) & _across(better, width)
        best = jnp.where(goes, _across(largest, width), best)
        best_ids = jnp.where(goes, _across(latest, width), best_ids)
        choice = jnp.where(ids == _across(latest, C), -jnp.inf, choice)
        return choice, choice.max(1), best, best_ids

    state = lax.while_loop(beats, take, (choice, choice.max(1), best, best_ids))
    return state[2:]


def _across(x, columns):
    return lax.broadcast_in_dim(x, (C, columns), [0])
