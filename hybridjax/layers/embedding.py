"""The token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import project
from hybridjax.sharding import current_spec, over_mesh, place


class Embedding(nnx.Module):
    """A table of one vector per token of the vocabulary."""

    def __init__(self, vocab: int, width: int, key: jax.Array, *, std: float):
        table = jax.random.normal(key, (vocab, width)) * std
        self.table = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        table = self.table[...].astype(dtype)
        if tokens.size < table.shape[0]:
            return place(_few_rows(table, tokens), "batch", "length", None)
        # The rows are gathered over `vocab` too: a lookup into a sharded table would be a
        # one-hot product of its size.
        out = current_spec(("batch", "length", None), (*tokens.shape, table.shape[1]))
        return place(table, None, None).at[tokens].get(out_sharding=out)


def _few_rows(table: Float[Array, "vocab D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows looked up where they lie, on every device for all tokens: fewer bytes than the table."""
    axes = ("vocab", "embed")
    parts = current_spec(axes, table.shape)
    over = None if parts is None else parts[0]

    def lookup(table, tokens):
        if over is None:
            return table[tokens]
        row = tokens - table.shape[0] * jax.lax.axis_index(over)
        here = (row >= 0) & (row < table.shape[0])
        return jax.lax.psum(jnp.where(here[..., None], table[row], 0), over)

    shape = (*tokens.shape, table.shape[1])
    return over_mesh(lookup, (axes, (None, None)), ((None, None, "embed"), shape))(table, tokens)


def head_logits(h: Float[Array, "B T D"], kernel: Float[Array, "D vocab"]) -> Array:
    """`h W` accumulated in f32, sharded over the vocabulary."""
    kernel = place(kernel.astype(h.dtype), None, "vocab")
    return project(h, kernel, "vocab", jnp.float32)
