"""Streaming top-k of chunks on TPU: a Pallas Mosaic kernel; its gradient is that of every form.

A grid step scores a block of landmarks for 128 queries, which are lanes, and merges it into the k
best so far by taking the largest k times. Blocks that no query of the tile may choose from are
neither fetched nor scored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arguments import refuse_traced
from pallas_kernels.chunk_topk.gradient import with_gradient
from pallas_kernels.chunk_topk.limits import refuse_sizes
from pallas_kernels.chunk_topk.noise import gumbel
from pallas_kernels.chunk_topk.xla import latest_first
from pallas_kernels.dispatch import target_platform
from pallas_kernels.mosaic_tpu import LANES, NT, as_column, dot

_BLOCK = 512  # chunks
_LARGEST_WIDTH = 4096  # of a block of landmarks in VMEM
_LARGEST_K = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernel is built."""

    k: int
    scale: float
    block: int  # chunks per grid step
    packed: bool
    noisy: bool

    @property
    def rows(self):
        return self.k + -self.k % 8


def chunk_topk(q, landmarks, ended, segments, chunk_segments, words, *, k, scale):
    if target_platform() != "tpu":
        raise NotImplementedError(f"serves TPU only, the target is {target_platform()}")
    if q.dtype != landmarks.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"needs q and landmarks both bfloat16 or both float32, "
                                  f"got {q.dtype} and {landmarks.dtype}")
    refuse_traced(scale)
    refuse_sizes(landmarks, k, widest=_LARGEST_WIDTH, largest_k=_LARGEST_K)
    block = min(_BLOCK, landmarks.shape[1] + -landmarks.shape[1] % LANES)
    plan = Plan(k, scale, block, segments is not None, words is not None)
    return with_gradient(functools.partial(_choose, plan), scale, q, landmarks,
                         (ended, segments, chunk_segments, words))


def _choose(plan, q, landmarks, ended, segments, chunk_segments, words):
    (B, T, G, R), N = q.shape, landmarks.shape[1]
    ended = _padded(jnp.minimum(ended, N), LANES)
    tiles, steps = ended.shape[1] // LANES, -(-N // plan.block)
    # Per row and tile: how many blocks hold a chunk that some query may choose.
    blocks = -(-ended.reshape(B * tiles, LANES).max(1) // plan.block)
    last = lambda b, t, n, blocks: jnp.minimum(n, jnp.maximum(blocks[b * tiles + t] - 1, 0))

    tokens = pl.BlockSpec((1, 1, LANES), lambda b, g, t, n, _: (b, 0, t))
    of_group = pl.BlockSpec((1, 1, 1, LANES), lambda b, g, t, n, _: (b, g, 0, t))
    chunks = pl.BlockSpec((1, 1, plan.block),
                          lambda b, g, t, n, blocks: (b, 0, last(b, t, n, blocks)))
    best = pl.BlockSpec((1, 1, plan.rows, LANES), lambda b, g, t, n, _: (b, g, 0, t))
    arrays, specs = [ended[:, None]], [tokens]
    if plan.packed:
        arrays += [_padded(segments, LANES)[:, None],
                   _padded(chunk_segments, plan.block)[:, None]]
        specs += [tokens, chunks]
    if plan.noisy:
        arrays.append(jnp.swapaxes(_padded(words, LANES), 1, 2)[:, :, None])
        specs.append(of_group)
    arrays += [jnp.swapaxes(_padded(q, LANES), 1, 2),
               jnp.swapaxes(_padded(landmarks, plan.block), 1, 2)]
    specs += [pl.BlockSpec((1, 1, LANES, R), lambda b, g, t, n, _: (b, g, t, 0)),
              pl.BlockSpec((1, 1, plan.block, R),
                           lambda b, g, t, n, blocks: (b, g, last(b, t, n, blocks), 0))]

    shape = B, G, plan.rows, tiles * LANES
    choice, indices = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(B, G, tiles, steps), in_specs=specs,
            out_specs=[best, best],
            scratch_shapes=[pltpu.VMEM((plan.block + 2 * plan.rows, LANES), jnp.float32),
                            pltpu.VMEM((plan.rows, LANES), jnp.int32)]),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32),
                   jax.ShapeDtypeStruct(shape, jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name="chunk_topk",
    )(blocks, *arrays)
    choice, indices = (jnp.moveaxis(x[:, :, :plan.k, :T], 3, 1) for x in (choice, indices))
    return latest_first(choice, indices, words)


def _padded(x, size):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])


def _kernel(plan, blocks_ref, ended_ref, *refs):
    segments = refs[:2] if plan.packed else ()
    words = refs[len(segments):len(segments) + plan.noisy]
    q_ref, landmarks_ref, choice_ref, indices_ref, pool_ref, before_ref = refs[
        len(segments) + len(words):]
    b, t, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        choice_ref[...] = jnp.full_like(choice_ref, -jnp.inf)
        indices_ref[...] = jnp.full_like(indices_ref, -1)

    size = plan.block + plan.rows
    block_ids = lambda: n * plan.block + lax.broadcasted_iota(jnp.int32, (plan.block, LANES), 0)

    def take_largest(j, _):
        pool, ids = pool_ref[:size], jnp.concatenate([block_ids(), before_ref[...]])
        largest = jnp.max(pool, axis=0, keepdims=True)
        latest = jnp.max(jnp.where(pool == largest, ids, -1), axis=0, keepdims=True)
        indices_ref[0, 0, pl.ds(j, 1)] = latest
        # To the same scratch: what is loaded after it is loaded again, and does not spill.
        pool_ref[pl.ds(size + j, 1)] = largest
        pool_ref[:size] = jnp.where(ids == latest, -jnp.inf, pool_ref[:size])
        return 0

    @pl.when(n < blocks_ref[b * pl.num_programs(2) + t])
    def _():
        ids = block_ids()
        choice = plan.scale * dot(landmarks_ref[0, 0], q_ref[0, 0], NT)
        if plan.noisy:
            choice += gumbel(words[0][0, 0], ids)
        visible = ids < ended_ref[0]
        if plan.packed:
            segment_ref, chunk_segment_ref = segments
            visible &= as_column(chunk_segment_ref[0]) == segment_ref[0]
        choice = jnp.where(visible, choice, -jnp.inf)
        largest = jnp.max(choice, axis=0, keepdims=True)
        least = choice_ref[0, 0, plan.k - 1:plan.k]
        better = jnp.where((largest >= least) & (largest > -jnp.inf), 1, 0)

        @pl.when(jnp.max(better) > 0)
        def _():
            pool_ref[:plan.block], pool_ref[plan.block:size] = choice, choice_ref[0, 0]
            pool_ref[size:] = jnp.full_like(choice_ref[0, 0], -jnp.inf)
            before_ref[...] = indices_ref[0, 0]
            lax.fori_loop(0, plan.k, take_largest, 0)
            choice_ref[0, 0] = pool_ref[size:]
