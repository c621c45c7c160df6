"""Retrieval: each token chooses the chunks of its past that hierarchical sparse attention reads.

Length Generalization in Hierarchical Sparse Attention Models (arXiv 2510.17196): with a retrieval
query q and the chunks' landmarks l, chunk n scores q l_n / sqrt(R); the J best of those that are
whole are chosen, and weighed by a rule of eq. 1. The scores enter the output through the weights,
and so learn from the loss of the language model: the landmark learns what mass attention would
give its chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.config import UserError
from hybridjax.layers.linear import Linear, split_heads
from hybridjax.layers.norm import RMSNorm
from hybridjax.mixers.base import Context, Mixer, new_length, place_state, state, state_field
from hybridjax.mixers.chunk_memory import ChunkMemory
from hybridjax.sharding import context_axis, over_mesh, place, ways
from pallas_kernels.chunk_topk import chunk_topk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The chunks that each token reads, the most recent first; -1 where there are fewer."""

    indices: Int[Array, "B T G J"]
    weights: Float[Array, "B T G J"] | None  # None: one softmax over the tokens of all of them
    # Of a memory on the host: the chosen chunks alone, which `indices` then count.
    keys: Float[Array, "B U*C G K"] | None = None
    values: Float[Array, "B U*C G V"] | None = None


@state
class RetrievalState:
    """`8 B G J` bytes: the choice that holds on until the next."""

    indices: Int[Array, "B 1 G J"] = state_field("batch", None, "heads", None)
    scores: Float[Array, "B 1 G J"] = state_field("batch", None, "heads", None)
    length: Int[Array, " B"] = state_field("batch")


class Retrieval(Mixer):
    publishes = ("selection",)
    reads = ("memory",)
    adds = False

    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        groups: int,
        landmark_dim: int,
        top_k: int = 8,
        weights: str = "softmax",
        every: int = 1,
        window: int | None = None,
        noise: bool = False,
        recency_bias: bool = False,
        norm: bool = False,
        eps: float = 1e-6,
    ):
        """Args:
        groups, landmark_dim: as the chunk encoder has them.
        top_k: chunks per token, J. Few of many: else nothing has to be told apart.
        weights: "softmax", "stick" (breaking, from the most recent on), or "joint": one softmax
            over the tokens of all chosen chunks, which gives the scores no gradient.
        every: tokens between choices; those between keep the last one.
        window: hides the chunks that sliding-window attention of that window sees whole.
        noise: adds Gumbel noise to the choice (not to the weights) where the context has a key.
        recency_bias: adds a learned multiple of a chunk's rank among the chosen to its score.
        norm: normalises the queries.
        """
        if weights not in WEIGHTS:
            raise UserError(f"weights is {weights!r}: use one of {', '.join(WEIGHTS)}")
        if min(top_k, every) < 1:
            raise UserError(f"top_k is {top_k} and every {every}: both must be at least 1")
        self.groups, self.landmark_dim = groups, landmark_dim
        self.top_k, self.weights, self.every = top_k, weights, every
        self.window, self.noise = window, noise
        self.query = Linear((width, groups * landmark_dim), ("embed", "heads"), key)
        self.norm = RMSNorm(landmark_dim, eps=eps) if norm else None
        self.recency_bias = nnx.Param(jnp.zeros(()), axes=()) if recency_bias else None

    @property
    def reach(self) -> int:
        return self.every - 1

    def __call__(self, x: Float[Array, "B T D"], ctx: Context):
        chosen = self._choose(x, ctx, "length")
        if self.every > 1:
            chosen = _held(chosen, ctx, self.every, ctx.shared["memory"].chunk_size)
        return None, {"selection": self._selection(*chosen, ctx)}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> RetrievalState:
        shape = (batch, 1, self.groups, self.top_k)
        none, length = jnp.full(shape, -1, jnp.int32), jnp.zeros(batch, jnp.int32)
        return place_state(RetrievalState(none, jnp.full(shape, -jnp.inf), length))

    def extend(self, x: Float[Array, "B T D"], state: RetrievalState, ctx: Context):
        """The choices of the state and of these tokens in one row, of which each takes its own."""
        chosen = self._choose(x, ctx, None)
        before = state.indices, state.scores
        line = [jnp.concatenate(pair, axis=1) for pair in zip(before, chosen, strict=True)]
        tokens = jnp.arange(1, x.shape[1] + 1)
        positions = place(ctx.positions, "batch", None)  # as the choices are
        slots = jnp.maximum(tokens - positions % self.every, 0)
        indices, scores = (_take(y, slots) for y in line)
        length = new_length(state.length, ctx)
        last = (length - state.length)[:, None]  # 0: what the state had
        last = jnp.where(last > 0, jnp.take_along_axis(slots, jnp.maximum(last - 1, 0), axis=1), 0)
        state = RetrievalState(*(_take(y, last) for y in line), length)
        return None, state, {"selection": self._selection(indices, scores, ctx)}

    def _choose(self, x, ctx: Context, rows: str | None) -> tuple[Array, Array]:
        """Indices and scores `[B, T, G, J]`; `rows`: the logical axis of x's tokens."""
        memory: ChunkMemory = ctx.shared["memory"]
        if memory.landmarks.shape[2:] != (self.groups, self.landmark_dim):
            raise UserError(
                f"retrieval has {self.groups} groups of {self.landmark_dim} and the memory "
                f"{memory.landmarks.shape[2:]}: give both the same groups and landmark_dim"
            )
        q = split_heads(self.query(x), self.landmark_dim)
        q = q if self.norm is None else self.norm(q)
        axis = context_axis(q.shape[1]) if rows else None
        split = None if rows else context_axis(memory.landmarks.shape[1])

        def choose(q, landmarks, segments, chunk_segments, start, key):
            if axis is not None:
                start = start + q.shape[1] * jax.lax.axis_index(axis)
            return chunk_topk(
                q, landmarks, k=self.top_k, chunk_size=memory.chunk_size, segments=segments,
                chunk_segments=chunk_segments, start=start, window=self.window, noise_key=key,
                context_axis=split, exchange=split and "merge",
            )  # fmt: skip

        heads = ("batch", rows, "heads" if self.groups % ways("heads") == 0 else None, None)
        out = (heads, (*q.shape[:3], self.top_k))
        chunks, batch = ("batch", split and "length"), ("batch",)
        in_axes = (heads, (*chunks, *heads[2:]), ("batch", rows), chunks, batch, ())
        key = ctx.key if self.noise else None
        return over_mesh(choose, in_axes, (out, out))(
            q, memory.landmarks, ctx.segments, memory.segments, memory.start, key
        )

    def _selection(self, indices: Array, scores: Array, ctx: Context) -> Selection:
        if self.recency_bias is not None:
            scores = scores + self.recency_bias[...] * jnp.arange(scores.shape[-1])
        weights = WEIGHTS[self.weights](scores)
        if (chunks := ctx.shared["memory"].on_host) is None:
            return Selection(indices, weights)
        keys, values, indices = chunks.fetch(indices)
        return Selection(indices, weights, keys, values)


def _held(
    chosen: tuple[Array, Array], ctx: Context, every: int, chunk_size: int
) -> tuple[Array, Array]:
    """Each token's choice replaced by that of the last token at a multiple of `every`."""
    shape = chosen[0].shape
    devices = ways("length", shape[1])
    if devices > 1 and (chunk_size % every or shape[1] // devices % every):
        raise UserError(
            f"every is {every}: where rows of {shape[1]} are split over {devices} devices, it must "
            f"divide the chunk size {chunk_size} and a device's part"
        )

    def hold(indices, scores, positions):
        slots = jnp.arange(positions.shape[1]) - positions % every
        return _take(indices, slots), _take(scores, slots)

    rows = ("batch", "length")
    axes = (*rows, None, None)
    hold = over_mesh(hold, (axes, axes, rows), ((axes, shape), (axes, shape)))
    return hold(*chosen, ctx.positions)


def _take(x: Float[Array, "B T G J"], slots: Int[Array, "B S"]) -> Float[Array, "B S G J"]:
    return jnp.take_along_axis(x, slots[..., None, None], axis=1)


def softmax_weights(scores: Float[Array, "*B J"]) -> Float[Array, "*B J"]:
    """`exp(s_j) / sum exp(s)` (eq. 1); 0 for scores of -inf, and if all are."""
    chosen = scores > -jnp.inf
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=-1e30)
    shifted = jnp.where(chosen, scores - jax.lax.stop_gradient(largest), 0.0)
    mass = jnp.where(chosen, jnp.exp(shifted), 0.0)
    return mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-30)


def stick_breaking_weights(scores: Float[Array, "*B J"]) -> Float[Array, "*B J"]:
    """`sigmoid(s_j) prod_(i < j) (1 - sigmoid(s_i))` (eq. 1), the most recent chunk first."""
    chosen = scores > -jnp.inf
    scores = jnp.where(chosen, scores, 0.0)
    spent = jnp.cumsum(jnp.where(chosen, jax.nn.softplus(scores), 0.0), axis=-1)
    return jnp.where(chosen, jnp.exp(scores - spent), 0.0)


WEIGHTS = {
    "softmax": softmax_weights,
    "stick": stick_breaking_weights,
    "joint": lambda scores: None,
}
