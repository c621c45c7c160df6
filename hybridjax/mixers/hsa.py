"""Hierarchical sparse attention over the chunks that a retrieval has chosen.

Length Generalization in Hierarchical Sparse Attention Models (arXiv 2510.17196), eq. 2: attention
within each chosen chunk by itself, and the outputs summed with the retrieval's weights w,

    o_t = sum_j w_tj softmax(q_t K_j^T / sqrt(K)) V_j,

without positions. In a block with `residual="bypass"` (eq. 6b) what was read reaches the stream
through the MLP alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.layers.linear import Linear, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.mixers.base import Context, Mixer, new_length, place_state, state, state_field
from hybridjax.mixers.chunk_memory import ChunkMemory
from hybridjax.mixers.retrieval import Selection
from hybridjax.sharding import context_axis, over_mesh, ways
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention


@state
class HSAState:
    """Nothing: the memory lives with its publisher."""

    length: Int[Array, " B"] = state_field("batch")


class HSA(Mixer):
    reads = ("memory", "selection")
    reach = 0

    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        qk_norm: bool = True,
        off_by_one: bool = False,
        eps: float = 1e-6,
    ):
        """Args:
        heads, head_dim: of the queries; the chunk encoder says how many K/V heads there are.
        off_by_one: adds 1 to each softmax's denominator, so that a chunk can be ignored.
        """
        self.heads, self.head_dim, self.off_by_one = heads, head_dim, off_by_one
        keys = jax.random.split(key)
        self.query = Linear((width, heads * head_dim), ("embed", "heads"), keys[0])
        self.query_norm = RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.output = Linear((heads * head_dim, width), ("heads", "embed"), keys[1])

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T D"]:
        return self._read(x, ctx, "length")

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> HSAState:
        return place_state(HSAState(jnp.zeros(batch, jnp.int32)))

    def extend(self, x: Float[Array, "B T D"], state: HSAState, ctx: Context):
        return self._read(x, ctx, None), HSAState(new_length(state.length, ctx))

    def _read(self, x, ctx: Context, rows: str | None) -> Float[Array, "B T D"]:
        """`rows`: the logical axis of x's tokens."""
        memory: ChunkMemory = ctx.shared["memory"]
        selection: Selection = ctx.shared["selection"]
        source = memory if selection.keys is None else selection
        keys, values = source.keys, source.values
        kv_heads, head_dim = keys.shape[2:]
        groups = selection.indices.shape[2]
        if self.heads % kv_heads or kv_heads % groups or head_dim != self.head_dim:
            raise UserError(
                f"{self.heads} heads of {self.head_dim} cannot read a memory of {kv_heads} K/V "
                f"heads of {head_dim} in {groups} groups: give the same head_dim, and heads that "
                "are a multiple of kv_heads, and these of groups"
            )
        q = split_heads(self.query(x), self.head_dim)
        q = q if self.query_norm is None else self.query_norm(q)
        split = None if rows else context_axis(keys.shape[1] // memory.chunk_size)

        def attend(q, k, v, *selection):
            indices, weights = (_shared(y, k.shape[2]) for y in selection)
            return chunk_sparse_attention(
                q, k, v, indices, weights, chunk_size=memory.chunk_size,
                off_by_one=self.off_by_one, context_axis=split, exchange=split and "merge",
            )  # fmt: skip

        divides = kv_heads % ways("heads") == 0 and groups in (1, kv_heads)
        heads = "heads" if divides else None
        queries, chunks = ("batch", rows, heads, None), ("batch", split and "length", heads, None)
        chosen = ("batch", rows, heads if groups == kv_heads else None, None)
        in_axes = (queries, chunks, chunks, chosen, chosen)
        attend = over_mesh(attend, in_axes, (queries, q.shape))
        o = attend(q, keys, values, selection.indices, selection.weights)
        return self.output(o.astype(x.dtype).reshape(*x.shape[:2], -1))


def _shared(y: Array | None, kv_heads: int) -> Array | None:
    """A selection `[B, T, G, J]` of fewer groups than there are K/V heads, for each of these."""
    if y is None or y.shape[2] == kv_heads:
        return y
    return jnp.repeat(y, kv_heads // y.shape[2], axis=2)
