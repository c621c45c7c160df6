"""Needle in a haystack: exact match of a fact's value by length and depth.

A test is real text with `facts` facts of one form; the question at its end asks for one of them,
the others are distractors. Answers are teacher-forced: exact if every token of the answer is the
likeliest.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.data.retrieval import Haystack, needle_batch
from hybridjax.data.tasks import Exam
from hybridjax.evals.batches import in_batches, traced
from hybridjax.generate import new_state, prefill
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder, DecoderState
from hybridjax.sharding import place

TAIL = 32  # tokens at the end of a row whose predictions are looked at
PIECE = 2048  # tokens of a longer row that are read at once, where the stack allows


@dataclasses.dataclass(frozen=True)
class Cell:
    """The tests of one length and one logit base."""

    length: int
    times: int  # of the training length
    facts: int
    logit_base: float | None
    exact: float
    deep: float | None  # exact match where the fact lies before the last training length
    near: float | None  # and where it lies within it
    deep_examples: int
    examples: int
    by_depth: tuple[float, ...]  # from the start of the row to the question
    chance: float


def by_length(
    model: Decoder,
    haystack: Haystack,
    *,
    train_length: int,
    times: Sequence[int],
    facts: int,
    examples: int,
    logit_bases: tuple[float | None, ...],
) -> list[Cell]:
    """The cells of every multiple of the training length that has room for the facts."""
    return [
        cell
        for t in fitting(haystack, train_length, times, facts)
        for cell in needle(
            model,
            haystack,
            train_length=train_length,
            times=t,
            facts=facts,
            examples=examples,
            logit_bases=logit_bases,
        )
    ]


def fitting(haystack: Haystack, train_length: int, times: Sequence[int], facts: int) -> list[int]:
    """The multiples of the training length at which a text has room for so many facts."""
    return [t for t in times if haystack.fits(t * train_length + 1, facts)]


def needle(
    model: Decoder,
    haystack: Haystack,
    *,
    train_length: int,
    times: int,
    facts: int,
    examples: int,
    logit_bases: tuple[float | None, ...],
    depths: int = 10,
    seed: int = 0,
) -> list[Cell]:
    """Exact match at `times` the training length, one cell per logit base (None: no scaling)."""
    length = times * train_length
    fractions = np.linspace(0, 1, depths)
    tests = [
        needle_batch(haystack, seed, -(-examples // depths), length, facts=facts, depth=float(f))
        for f in fractions
    ]
    deep = np.concatenate([t.distance[:, 0] for t in tests]) > train_length
    cells = []
    for base in logit_bases:
        exact = np.stack([exact_match(model, t, base) for t in tests])
        flat = exact.reshape(-1)
        cells.append(
            Cell(
                length=length,
                times=times,
                facts=facts,
                logit_base=base,
                exact=float(flat.mean()),
                deep=float(flat[deep].mean()) if deep.any() else None,
                near=float(flat[~deep].mean()) if not deep.all() else None,
                deep_examples=int(deep.sum()),
                examples=flat.size,
                by_depth=tuple(float(x) for x in exact.mean(axis=1)),
                chance=10.0**-haystack.value_length,
            )
        )
    return cells


def exact_match(model: Decoder, tests: Exam, logit_base: float | None) -> Float[np.ndarray, " n"]:
    """1 for each test, of one answer each, whose whole answer is predicted."""
    tail, base = min(TAIL, tests.tokens.shape[1]), traced(logit_base)
    whole = lambda t: _predict(model, t, Context.of_rows(t, logit_base=base), tail)
    skips = tests.tokens.shape[1] > PIECE and model.memory_depth < len(model.layers)
    predict = (lambda t: _predict_in_pieces(model, t, base, tail)) if skips else whole
    predicted = tests.targets.copy()
    predicted[:, -tail:] = in_batches(predict, tests.tokens)
    return tests.exact(predicted)[:, 0]


def _predict_in_pieces(
    model: Decoder, tokens: Int[np.ndarray, "B T"], base: Float[Array, ""], tail: int
) -> Int[Array, "B tail"]:
    """The same in bounded memory, for a stack whose upper layers need the ends of rows alone."""
    state = new_state(model, *tokens.shape)
    state, _ = prefill(model, tokens[:, :-tail], state, logit_base=base, piece=PIECE)
    return _predict_after(model, tokens[:, -tail:], state, base)


@jax.jit
def _predict_after(model: Decoder, tokens, state: DecoderState, base) -> Int[Array, "B tail"]:
    h, _ = model.extend(place(tokens, "batch", None), state, logit_base=base)
    return jnp.argmax(model.logits(h), axis=-1)


@jax.jit(static_argnums=3)
def _predict(
    model: Decoder, tokens: Int[Array, "B T"], ctx: Context, tail: int
) -> Int[Array, "B tail"]:
    h = model.hidden(tokens, ctx)
    return jnp.argmax(model.logits(h[:, -tail:]), axis=-1)
