"""The definition, with the whole T x N matrix of scores: the oracle. Follows q's dtype from f32."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chunk_topk.noise import gumbel


def chunk_topk(q, landmarks, ended, segments, chunk_segments, words, *, k, scale):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    N = landmarks.shape[1]
    scores = scale * jnp.einsum("btgr,bngr->btgn", q.astype(dtype), landmarks.astype(dtype))
    visible = np.arange(N) < ended[:, :, None]
    if segments is not None:
        visible &= segments[:, :, None] == chunk_segments[:, None]
    choice = jax.lax.stop_gradient(scores)
    if words is not None:
        choice += gumbel(words[..., None], np.arange(N))
    choice = jnp.where(visible[:, :, None], choice, -jnp.inf)

    order = N - 1 - jnp.argsort(-choice[..., ::-1], axis=-1, stable=True)[..., :k]
    chosen = jnp.where(jnp.take_along_axis(choice, order, axis=-1) > -jnp.inf, order, -1)
    chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, k - chosen.shape[-1])], constant_values=-1)
    chosen = -jnp.sort(-chosen.astype(jnp.int32), axis=-1)
    if N == 0:
        return chosen, jnp.full(chosen.shape, -jnp.inf, dtype)
    scores = jnp.take_along_axis(scores, jnp.maximum(chosen, 0), axis=-1)
    return chosen, jnp.where(chosen < 0, -jnp.inf, scores)
