"""The k chunks of the past whose landmarks score highest, for each query and group of heads.

The retrieval of hierarchical sparse attention: Hu et al., 2025, "Random Long-Context Access for
Mamba via Hardware-aligned Hierarchical Sparse Attention" (https://arxiv.org/abs/2504.16795) and
https://arxiv.org/abs/2510.17196, section 2: `s = scale q . landmark` over chunks that end before
the query.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays, check_exchange
from pallas_kernels.chunk_topk import noise
from pallas_kernels.chunk_topk.context import best_of_parts
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.precision import exact_products

_dispatch = Dispatch("chunk_topk", __name__, names=("reference", "xla", "tpu", "gpu"),
                     best={"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")})


@exact_products
def chunk_topk(
    q: Float[Array, "B T G R"],
    landmarks: Float[Array, "B N G R"],
    *,
    k: int,
    chunk_size: int,
    segments: Int[Array, "B T"] | None = None,
    chunk_segments: Int[Array, "B N"] | None = None,
    start: Int[Array, " B"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    noise_key: jax.Array | None = None,
    context_axis: str | None = None,
    exchange: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Int[Array, "B T G J"], Float[Array, "B T G J"]]:
    """The chosen chunks, J = k slots from the latest chunk to the earliest, and their scores.

    Chunk i holds the tokens from `i * chunk_size` on, counted from the start of the row. A query at
    index t may choose it if it has ended, `(i + 1) * chunk_size <= t`, and their segments are equal
    and not 0. Of equal scores the later chunk's counts as higher.

    Args:
      landmarks: of all chunks of the memory; those not yet complete are never chosen.
      segments, chunk_segments: document ids of queries and of chunks, 0 = padding (or a chunk of
        several documents). Both or neither.
      start: index in its row of each row's first query; default 0.
      window: leaves chunks to sliding-window attention: one that lies wholly within the query's
        last `window` tokens, its own included, is not chosen.
      scale: default `R ** -0.5`.
      noise_key: adds Gumbel(0, 1) noise to the scores by which chunks are chosen, not to those
        returned. It depends on the key and the places of row, query, group and chunk only.
      context_axis: inside shard_map, the mesh axis along which rows are split: queries and
        landmarks are those of this device's contiguous part, indices count from the row's start.
      exchange: None gathers all landmarks. "merge" is for few queries, whole on every device: each
        chooses of its own landmarks, and their choices meet, `8 P k` bytes for each query.
      implementation: None (best for the target platform), a name, or names to try in order.

    Returns:
      indices in int32, -1 in empty slots, which are the last ones; and scores in f32, -inf there.
      Gradients flow through the scores; the choice has none.
    """
    q, landmarks = jnp.asarray(q), jnp.asarray(landmarks)
    _check(q, landmarks, k, chunk_size, segments, chunk_segments, start, window)
    check_exchange(exchange, context_axis)
    if exchange and noise_key is not None:
        raise ValueError("exchange='merge' is for decoding, which draws no noise: leave noise_key")
    (_, T, G, R), N = q.shape, landmarks.shape[1]
    start = jnp.zeros(q.shape[0], jnp.int32) if start is None else start
    if context_axis is not None and exchange is None:
        start = start + T * jax.lax.axis_index(context_axis)
        gather = lambda x: jax.lax.all_gather(x, context_axis, axis=1, tiled=True)
        landmarks, chunk_segments = jax.tree.map(gather, (landmarks, chunk_segments))
    index = start[:, None] + jnp.arange(T, dtype=jnp.int32)
    ended = _ended(index, segments, chunk_size, window)
    words = None if noise_key is None else noise.words(noise_key, index, G)
    choose = functools.partial(
        _dispatch, implementation, k=k, scale=R**-0.5 if scale is None else scale)
    if exchange is None:
        return choose(q, landmarks, ended, segments, chunk_segments, words)
    first = N * jax.lax.axis_index(context_axis)
    ended = jnp.clip(ended - first, 0, N)
    chosen = choose(q, landmarks, ended, segments, chunk_segments, None)
    return best_of_parts(*chosen, first, context_axis)


def _ended(index, segments, chunk_size, window) -> Int[Array, "B T"]:
    """How many chunks, from the row's first on, end early enough for each query; of padding 0."""
    ended = index // chunk_size
    if window is not None:
        ended = jnp.clip((index - window) // chunk_size + 1, 0, ended)
    return ended if segments is None else jnp.where(segments == 0, 0, ended)


def _check(q, landmarks, k, chunk_size, segments, chunk_segments, start, window):
    if q.ndim != 4 or landmarks.ndim != 4:
        raise ValueError(f"q [B, T, G, R] and landmarks [B, N, G, R] must have rank 4, "
                         f"got {q.shape} and {landmarks.shape}")
    (B, T, G, R), N = q.shape, landmarks.shape[1]
    expected = {
        "q": (q, (B, T, G, R)), "landmarks": (landmarks, (B, N, G, R)),
        "segments": (segments, (B, T)), "chunk_segments": (chunk_segments, (B, N)),
        "start": (start, (B,)),
    }
    check_arrays(expected, of=f"q {list(q.shape)}",
                 integers=("segments", "chunk_segments", "start"))
    if (segments is None) != (chunk_segments is None):
        raise ValueError("segments and chunk_segments must be given together")
    if 0 in (T, G, R):
        raise ValueError(f"T, G and R must be at least 1, got {T}, {G} and {R}")
    for name, x in dict(k=k, chunk_size=chunk_size, window=window).items():
        if x is not None and x < 1:
            raise ValueError(f"{name} must be at least 1, got {x}")
