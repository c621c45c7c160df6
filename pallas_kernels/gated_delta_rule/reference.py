"""The recurrence, one token after another: the oracle. Follows the inputs' dtype from f32 up."""

import jax
import jax.numpy as jnp


def gated_delta_rule(q, k, v, beta, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size, unroll=1):
    del output_final_state, chunk_size
    B, T, H, V = v.shape
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k = queries_per_state(q.astype(dtype), H), keys_per_state(k.astype(dtype), H)
    state = jnp.zeros((B, H, k.shape[-1], V)) if initial_state is None else initial_state
    segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
    decay = jnp.zeros((B, T, H)) if decay is None else decay

    def step(carry, token):
        state, document = carry
        q, k, v, beta, g, segment = token
        real = segment != 0
        begins = real & (document != 0) & (segment != document)
        keep = jnp.where(begins[:, None], 0, jnp.exp(g))
        kept = keep[..., None, None] * state
        error = v - jnp.einsum("bhk,bhkv->bhv", k, kept)
        new = kept + k[..., :, None] * (beta[..., None] * error)[..., None, :]
        state = jnp.where(real[:, None, None, None], new, state)
        o = scale * jnp.einsum("bhrk,bhkv->bhrv", q, state)
        carry = state, jnp.where(real, segment, document)
        return carry, jnp.where(real[:, None, None, None], o, 0)

    tokens = [x.astype(dtype) for x in (q, k, v, beta, decay)] + [segments]
    carry = (state.astype(dtype), jnp.zeros_like(segments[:, 0]))
    (state, _), o = jax.lax.scan(step, carry, [jnp.moveaxis(x, 1, 0) for x in tokens],
                                 unroll=unroll)
    return jnp.moveaxis(o, 0, 1).reshape(B, T, -1, V).astype(v.dtype), state


def queries_per_state(q, H):
    """[B, T, Hq, K] -> [B, T, H, R, K]: the queries that read each state."""
    q = jnp.repeat(q, max(1, H // q.shape[2]), axis=2)
    return q.reshape(*q.shape[:2], H, -1, q.shape[-1])


def keys_per_state(k, H):
    """[B, T, Hk, K] -> [B, T, H, K]."""
    return jnp.repeat(k, H // k.shape[2], axis=2)
