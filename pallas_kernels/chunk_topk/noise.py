"""Gumbel noise as a function of place, the same however the work is tiled or split."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def words(key: jax.Array, index: Int[Array, "B T"], G: int) -> UInt32[Array, "B T G"]:
    """A random word for each row, query (by its index in the row) and group."""
    first, second, third = jax.random.bits(key, (3,), jnp.uint32)
    row = jnp.arange(index.shape[0], dtype=jnp.uint32)[:, None, None]
    group = jnp.arange(G, dtype=jnp.uint32)
    word = _mix(row ^ first)
    word = _mix(word + (index.astype(jnp.uint32)[..., None] ^ second))
    return _mix(word + (group ^ third))


def gumbel(word: UInt32[Array, "..."], chunk: Int[Array, "..."]) -> Float[Array, "..."]:
    """Gumbel(0, 1) of a query's word and a chunk, broadcast."""
    bits = _mix(word + _mix(chunk.astype(jnp.uint32)))
    uniform = (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24 + 2.0**-25
    return -jnp.log(-jnp.log(uniform))


def _mix(x):
    """The finalizer of MurmurHash3 (A. Appleby, public domain): each bit depends on all."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
