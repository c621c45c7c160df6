"""The recurrence, one token after another: the oracle. Follows the inputs' dtype from f32 up."""

import jax
import jax.numpy as jnp


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    del output_final_state, chunk_size
    B, T, H, K = q.shape
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    state = jnp.zeros((B, H, K, v.shape[-1]), dtype) if initial_state is None else initial_state
    segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
    decay = jnp.broadcast_to(decay, (B, T, H))

    def step(carry, token):
        state, document = carry
        q, k, v, g, segment = token
        real = segment != 0
        begins = real & (document != 0) & (segment != document)
        keep = jnp.where(begins[:, None], 0, jnp.exp(g))
        new = keep[..., None, None] * state + k[..., :, None] * v[..., None, :]
        state = jnp.where(real[:, None, None, None], new, state)
        o = scale * jnp.einsum("bhk,bhkv->bhv", q, state)
        return (state, jnp.where(real, segment, document)), jnp.where(real[:, None, None], o, 0)

    tokens = [x.astype(dtype) for x in (q, k, v, decay)] + [segments]
    carry = (state.astype(dtype), jnp.zeros_like(segments[:, 0]))
    (state, _), o = jax.lax.scan(step, carry, [jnp.moveaxis(x, 1, 0) for x in tokens])
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
