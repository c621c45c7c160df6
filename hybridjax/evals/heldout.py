"""Bits per byte of held-out text, by length and by position; and the base of the log scaling.

HypeNet chooses the base `a` of its log-scaled attention logits after training, by the loss on
documents alone (arXiv 2601.22156, eq. 17 and table 6). Here those are the `tune` documents, so the
held-out ones stay unseen.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.data.text import documents
from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals.batches import in_batches, traced
from hybridjax.loss import next_token_loss
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Heldout:
    length: int
    logit_base: float | None
    bits_per_byte: float
    positions: tuple[int, ...]  # upper ends of the position buckets
    by_position: tuple[float, ...]  # bits per byte in each bucket


def rows_of_text(tokenizer: Tokenizer, split: str, length: int, tokens: int) -> np.ndarray:
    """About `tokens` tokens of a split as rows `[n, length + 1]`, each read as one document."""
    ids = _tokens(tokenizer, split)
    count = max(1, min(tokens, len(ids) - 1) // length)
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    return np.stack([ids[s : s + length + 1] for s in starts])


def longest_row(tokenizer: Tokenizer, split: str) -> int:
    """The largest length of a row that the split has the text for."""
    return len(_tokens(tokenizer, split)) - 1


def _tokens(tokenizer: Tokenizer, split: str) -> np.ndarray:
    return np.concatenate([tokenizer.encode(text + "\n") for text in documents(split)])


def bits_per_byte(
    model: Decoder, tokenizer: Tokenizer, rows: np.ndarray, logit_base: float | None = None
) -> Heldout:
    """Bits per byte of text rows `[n, length + 1]`."""
    length, base = rows.shape[1] - 1, traced(logit_base)
    context = lambda rows: Context.of_rows(rows[:, :-1], logit_base=base)
    nats = in_batches(lambda rows: _nats(model, rows, context(rows)), rows).astype(np.float64)
    bytes_per_token = sum(len(tokenizer.decode(r[1:]).encode()) for r in rows) / nats.size
    bits = nats / math.log(2) / bytes_per_token
    ends = [n for n in (2**i for i in range(5, 40)) if n < length] + [length]
    parts = np.split(bits.mean(axis=0), ends[:-1])
    by_position = tuple(float(part.mean()) for part in parts)
    return Heldout(length, logit_base, float(bits.mean()), tuple(ends), by_position)


def choose_logit_base(
    model: Decoder,
    tokenizer: Tokenizer,
    lengths: tuple[int, ...],
    tokens: int,
    candidates: tuple[float, ...],
) -> tuple[float | None, dict[float, float]]:
    """The candidate with the fewest bits per byte of `tune` text, averaged over the lengths.

    Returns:
      the base (None where no scaling is better than every candidate), and each one's bits; no
      scaling is under infinity.
    """
    texts = [rows_of_text(tokenizer, "tune", length, tokens) for length in lengths]
    bits = {
        base: float(
            np.mean(
                [
                    bits_per_byte(
                        model, tokenizer, rows, None if base == math.inf else base
                    ).bits_per_byte
                    for rows in texts
                ]
            )
        )
        for base in (*candidates, math.inf)
    }
    best = min(bits, key=bits.get)
    return None if best == math.inf else best, bits


@jax.jit
def _nats(model: Decoder, rows: Int[Array, "B T+1"], ctx: Context) -> Float[Array, "B T"]:
    targets = rows[:, 1:]
    h = model.hidden(rows[:, :-1], ctx)
    return next_token_loss(model, h, targets, jnp.ones(targets.shape))[1]
