"""The token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import project
from hybridjax.sharding import current_spec, place


class Embedding(nnx.Module):
    """A table of one vector per token of the vocabulary."""

    def __init__(self, vocab: int, width: int, key: jax.Array, *, std: float):
        table = jax.random.normal(key, (vocab, width)) * std
        self.table = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        # The rows are gathered over `vocab` too: a lookup into a sharded table would be a
        # one-hot product of its size.
        table = place(self.table[...].astype(dtype), None, None)
        out = current_spec(("batch", "length", None), (*tokens.shape, table.shape[1]))
        return table.at[tokens].get(out_sharding=out)


def head_logits(h: Float[Array, "B T D"], kernel: Float[Array, "D vocab"]) -> Array:
    """`h W` accumulated in f32, sharded over the vocabulary."""
    kernel = place(kernel.astype(h.dtype), None, "vocab")
    return project(h, kernel, "vocab", jnp.float32)
