"""Streaming top-k on any device: tiles of queries against blocks of landmarks.

A block's scores are first reduced to the maxima of runs of neighbouring chunks. The k best chunks
lie in the k best runs (of equal maxima, the later runs), so only these are looked into.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.xla import alike
from pallas_kernels.chunk_topk.gradient import with_gradient
from pallas_kernels.chunk_topk.noise import gumbel
from pallas_kernels.selection import in_tiles

_TILE = 2**18  # scores at a time: they stay in cache
_QUERIES = 64  # over all rows and groups, before blocks of landmarks are made smaller
_RUN = 16  # chunks


def chunk_topk(q, landmarks, ended, segments, chunk_segments, words, *, k, scale):
    choose = functools.partial(_choose, k=k, scale=scale)
    return with_gradient(choose, scale, q, landmarks, (ended, segments, chunk_segments, words))


def _choose(q, landmarks, ended, segments, chunk_segments, words, *, k, scale):
    (B, T, G, _), N = q.shape, landmarks.shape[1]
    if N == 0:
        return jnp.full((B, T, G, k), -1), jnp.full((B, T, G, k), -jnp.inf)
    block, queries = _tile_sizes(B * G, T, N)
    run = _RUN if block // _RUN >= 2 * k else 1

    def tile(q, ended, segments, words):
        best = functools.partial(
            _best_of_block, landmarks, chunk_segments, q, ended, segments, words,
            k=k, scale=scale, block=block, run=run)
        shape = *q.shape[:3], k
        none = jnp.full(shape, -jnp.inf, _wide(q)), jnp.full(shape, -1)
        none = alike(none, (q, landmarks, ended, segments, chunk_segments, words))
        blocks = jnp.minimum(-(-ended.max() // block), -(-N // block))
        choice, indices = jax.lax.fori_loop(0, blocks, best, none)
        indices = jnp.where(choice == -jnp.inf, -1, indices)
        if words is not None:
            choice -= gumbel(words[..., None], indices)
        minus_indices, choice = jax.lax.sort((-indices, choice), num_keys=1)
        return -minus_indices, choice

    return in_tiles(tile, queries, q, ended, segments, words)


def _tile_sizes(rows, T, N):
    """Chunks and queries of a tile of scores, of `rows` rows and groups."""
    queries = max(1, min(T, _QUERIES // rows))
    block = min(N, max(_TILE // (rows * queries), 2 * _RUN))
    block = block // _RUN * _RUN if block > _RUN else block
    return block, max(queries, _TILE // (rows * block))


def _best_of_block(landmarks, chunk_segments, q, ended, segments, words, i, best, *,
                   k, scale, block, run):
    """The best chunks up to block i, from the latest on, given those before it."""
    N = landmarks.shape[1]
    begin = jnp.minimum(i * block, N - block)  # the last one overlaps the one before
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, block, axis=1)
    ids = begin + np.arange(block)[:, None]
    choice = scale * jnp.einsum(
        "bngr,btgr->bgnt", cut(landmarks), q, preferred_element_type=_wide(q))
    if words is not None:
        choice += gumbel(jnp.moveaxis(words, 1, 2)[:, :, None], ids)
    visible = (ids >= i * block) & (ids < ended[:, None])
    if segments is not None:
        visible &= cut(chunk_segments)[:, :, None] == segments[:, None]
    choice = jnp.where(visible[:, None], choice, -jnp.inf)  # [B, G, block, T]

    runs = choice.reshape(*choice.shape[:2], block // run, run, -1).max(3)
    runs = jnp.swapaxes(runs[:, :, ::-1], 2, 3)
    latest_first = jnp.sort(_top(runs, min(k, block // run)), axis=-1)  # [B, G, T, runs]
    members = block - 1 - (latest_first[..., None] * run + np.arange(run))
    members = members.reshape(*members.shape[:3], -1)
    choice = jnp.take_along_axis(choice, jnp.swapaxes(members, 2, 3), axis=2)

    choice = jnp.concatenate([jnp.moveaxis(choice, 3, 1), best[0]], axis=-1)
    ids = jnp.concatenate([begin + jnp.swapaxes(members, 1, 2), best[1]], axis=-1)
    kept = jnp.sort(_top(choice, k), axis=-1)
    return tuple(jnp.take_along_axis(x, kept, axis=-1) for x in (choice, ids))


def _top(x, k):
    """Places of the k largest of the last axis; of equal ones the first. XLA's CPU backend has a
    fast form for matrices only."""
    return jax.lax.top_k(x.reshape(-1, x.shape[-1]), k)[1].reshape(*x.shape[:-1], k)


def _wide(q):
    return jnp.promote_types(q.dtype, jnp.float32)
