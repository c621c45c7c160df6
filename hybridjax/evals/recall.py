"""What hierarchical sparse attention retrieves: is it the chunk that says the answer, and why.

At the token before an answer, each layer that reads a memory of chunks is asked for the score of
every chunk's landmark, and for what full attention with its queries and keys would give the chunk.
The theory (arXiv 2510.17196, eq. 3 and 4) is that the first stands for the second,

    score(q, landmark_n)  ~  log sum_(j in chunk n) exp(q k_j / sqrt(K))  + a constant.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybridjax.config import UserError
from hybridjax.data.tasks import Exam
from hybridjax.evals.batches import in_batches, traced
from hybridjax.layers.linear import repeat_heads, split_heads
from hybridjax.mixers.base import Context
from hybridjax.mixers.chunk_encoder import ChunkEncoder
from hybridjax.mixers.chunk_memory import ChunkMemory
from hybridjax.mixers.hsa import HSA
from hybridjax.mixers.retrieval import Retrieval
from hybridjax.models.block import Block
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import place

DEPTHS = 10


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one layer sees of N chunks before each of A answers, with G scores for H heads."""

    scores: Float[np.ndarray, "n A G N"]
    mass: Float[np.ndarray, "n A H N"]
    visible: Bool[np.ndarray, "n A N"]
    true: Int[np.ndarray, "n A"]  # the chunk that says the answer; -1: no one chunk, or hidden

    def rank(self) -> Int[np.ndarray, "n A"]:
        """How many chunks are chosen before the true one, by the group that sees it best."""
        count = self.scores.shape[-1]
        scores = np.where(self.visible[:, :, None], self.scores, -np.inf)
        true = np.maximum(self.true, 0)[:, :, None, None]
        own = np.take_along_axis(scores, true, axis=-1)
        first = (scores > own) | ((scores == own) & (np.arange(count) > true))
        return first.sum(axis=-1).min(axis=-1)

    def correlation(self) -> Float[np.ndarray, " H"]:
        """Pearson's r of score and mass over the visible chunks of an answer, the mean over
        answers; nan where none sees three chunks."""
        scores = np.repeat(self.scores, self.mass.shape[2] // self.scores.shape[2], axis=2)
        visible = self.visible[:, :, None]
        x, y = (_centred(z, visible) for z in (scores, self.mass))
        spread = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
        enough = (self.visible.sum(-1) >= 3)[:, :, None] & (spread > 0)
        r = np.where(enough, (x * y).sum(-1) / np.where(enough, spread, 1), 0)
        counted = enough.sum(axis=(0, 1))
        return np.where(counted > 0, r.sum(axis=(0, 1)) / np.maximum(counted, 1), np.nan)


def _centred(x: Float[np.ndarray, "n A H N"], visible: Bool[np.ndarray, "n A 1 N"]) -> np.ndarray:
    """Less its mean over the visible chunks, 0 at the others."""
    x = np.where(visible, x.astype(np.float64), 0)
    mean = x.sum(-1, keepdims=True) / np.maximum(visible.sum(-1, keepdims=True), 1)
    return np.where(visible, x - mean, 0)


def report(readings: Sequence[Reading], exam: Exam, top_k: int) -> list[dict[str, Any]]:
    """Per layer: recall at k, of the answers that one visible chunk says, by depth at `top_k`; and
    the correlation of score and mass, by head."""
    depth = (exam.evidence[..., 0] / exam.asked * DEPTHS).astype(int).clip(0, DEPTHS - 1)
    lines = []
    for layer, reading in enumerate(readings):
        counted, rank = reading.true >= 0, reading.rank()
        share = lambda found: float(found.mean()) if found.size else None
        ks = [k for k in (2**i for i in range(20)) if k <= max(top_k, 8)]
        correlation = reading.correlation()
        lines.append(
            dict(
                layer=layer,
                top_k=top_k,
                answers=int(counted.sum()),
                chunks=reading.scores.shape[-1],
                recall={k: share(rank[counted] < k) for k in sorted({*ks, top_k})},
                by_depth=[
                    share(rank[counted & (depth == d)] < top_k) for d in range(DEPTHS)
                ],
                correlation=[None if np.isnan(r) else float(r) for r in correlation],
            )
        )  # fmt: skip
    return lines


def points(reading: Reading, most: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Score and mass of visible chunks, each less its mean over the chunks of the answer; at most
    so many, evenly drawn."""
    scores = np.repeat(reading.scores, reading.mass.shape[2] // reading.scores.shape[2], axis=2)
    visible = reading.visible[:, :, None]
    shown = np.broadcast_to(visible, scores.shape)
    x, y = (_centred(z, visible)[shown] for z in (scores, reading.mass))
    step = max(1, x.size // most)
    return x[::step], y[::step]


# ---------------------------------------------------------------- the layers


def top_k(model: Decoder) -> int:
    """Chunks per token. Raises UserError for a stack that retrieves none."""
    return _part(model, Retrieval).top_k


def readings(model: Decoder, exam: Exam, logit_base: float | None = None) -> list[Reading]:
    """One per layer that reads chunks, from the lowest on. Whole rows are read at once."""
    retrieval, size = _part(model, Retrieval), _part(model, ChunkEncoder).chunk_size
    asked, length = exam.asked, exam.tokens.shape[1]
    rows = np.concatenate([exam.tokens, asked], axis=1).astype(np.int32)
    base = traced(logit_base)
    seen = in_batches(lambda r: _see(model, r[:, :length], r[:, length:], base), rows)
    ended = asked // size
    if retrieval.window is not None:
        ended = ((asked - retrieval.window) // size + 1).clip(0, ended)
    visible = np.arange(seen.shape[-1]) < ended[..., None]
    first, last = exam.evidence[..., 0] // size, (exam.evidence[..., 1] - 1) // size
    one = (exam.evidence[..., 0] >= 0) & (first == last) & (first < ended)
    true = np.where(one, first, -1)
    groups = retrieval.groups
    split = lambda layer: (layer[:, :, :groups], layer[:, :, groups:])
    return [Reading(*split(layer), visible, true) for layer in np.moveaxis(seen, 1, 0)]


def _part(model: Decoder, kind: type):
    parts = (m for blocks in model.groups for block in blocks for m in block.mixers)
    found = next((m for m in parts if isinstance(m, kind)), None)
    if found is None:
        raise UserError(f"the stack {model.layers!r} retrieves no chunks: choose a run of HSA")
    return found


@jax.jit
def _see(
    model: Decoder, tokens: Int[Array, "B T"], asked: Int[Array, "B A"], base: Float[Array, ""]
) -> Float[Array, "B L A G+H N"]:
    """The scores and then the masses, for each of L layers."""
    asked = place(asked, "batch", None)

    def watch(block: Block, h, ctx):
        seen = []

        def run(mixer, x, ctx, _):
            out = mixer(x, ctx)
            y, published = out if mixer.publishes else (out, {})
            if isinstance(mixer, Retrieval):
                at = asked - asked % mixer.every  # where the choice that still holds was made
                published = published | {"scores": _scores(mixer, _at(x, at), ctx)}
            if isinstance(mixer, HSA):
                mass = _mass(mixer, _at(x, asked), ctx)
                seen.append(jnp.concatenate([ctx.shared["scores"], mass], axis=2))
            return y, None, published

        h, ctx, _ = block.residuals(run, h, ctx, [None] * len(block.mixers))
        return h, ctx, seen

    h = model.embedding(tokens, jnp.dtype(model.dtype))
    _, per_layer = model.fold(watch, h, Context.of_rows(tokens, logit_base=base))
    layers = [
        seen[r]
        for group, letters in zip(model.plan, per_layer.groups, strict=True)
        for r in range(group.repeats)
        for letter in letters
        for seen in letter
    ]
    return jnp.stack(layers, axis=1)


def _at(x: Float[Array, "B T D"], tokens: Int[Array, "B A"]) -> Float[Array, "B A D"]:
    x = place(x, "batch", None, None)
    return jnp.take_along_axis(x, tokens[..., None], axis=1)


def _scores(mixer: Retrieval, x: Float[Array, "B A D"], ctx: Context) -> Float[Array, "B A G N"]:
    memory: ChunkMemory = ctx.shared["memory"]
    q = split_heads(mixer.query(x), mixer.landmark_dim)
    q = q if mixer.norm is None else mixer.norm(q)
    q, landmarks = _whole(q), _whole(memory.landmarks)
    scores = jnp.einsum("bagr,bngr->bagn", q, landmarks, preferred_element_type=jnp.float32)
    return scores * mixer.landmark_dim**-0.5


def _mass(mixer: HSA, x: Float[Array, "B A D"], ctx: Context) -> Float[Array, "B A H N"]:
    memory: ChunkMemory = ctx.shared["memory"]
    q = split_heads(mixer.query(x), mixer.head_dim)
    q = q if mixer.query_norm is None else mixer.query_norm(q)
    q, keys = _whole(q), _whole(memory.keys)
    keys = repeat_heads(keys, mixer.heads // keys.shape[2])
    logits = jnp.einsum("bahk,bshk->bahs", q, keys, preferred_element_type=jnp.float32)
    logits = logits.reshape(*logits.shape[:3], -1, memory.chunk_size)
    return jax.nn.logsumexp(logits * mixer.head_dim**-0.5, axis=-1)


def _whole(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    return place(x, "batch", None, None, None)
