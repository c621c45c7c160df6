"""Tasks by length: what share of their answers a model gets right.

Teacher-forced, an answer is right if each of its tokens is the likeliest after the right ones; of
what the model writes itself (the likeliest token each time, questions given), the task's own rule
says it. The two can differ where a test has several answers, or where the answer's end is to be
found; else they are the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybridjax.data.tasks import Exam, Task
from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals.batches import in_batches, traced
from hybridjax.generate import new_state, prefill
from hybridjax.models.decoder import Decoder, DecoderState
from hybridjax.sharding import place

PIECE = 2048  # tokens of a row that are read at once
QUESTION = 64  # tokens before an answer that show a grade what was asked
DEPTHS = 10


@dataclasses.dataclass(frozen=True)
class TaskCell:
    """The tests of one task and length."""

    task: str
    length: int
    times: int  # of the training length
    logit_base: float | None
    exact: float  # of the answers, teacher-forced
    generated: float  # of the answers, written by the model
    whole: float  # of the tests, all answers written
    deep: float | None  # exact where the answer is said before the last training length
    by_depth: tuple[float | None, ...]  # exact, from the start of the row to the question
    examples: int
    chance: float
    guess: float


def by_length(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: Mapping[str, Task],
    *,
    train_length: int,
    times: Sequence[int],
    examples: int,
    logit_base: float | None,
) -> list[TaskCell]:
    form = dict(train_length=train_length, examples=examples, logit_base=logit_base)
    return [
        measure(model, tokenizer, name, task, times=t, **form)
        for name, task in tasks.items()
        for t in times
    ]


def measure(
    model: Decoder,
    tokenizer: Tokenizer,
    name: str,
    task: Task,
    *,
    train_length: int,
    times: int,
    examples: int,
    logit_base: float | None,
) -> TaskCell:
    exam = task.exam(examples, times * train_length)
    forced, written = answers(model, exam, logit_base, task.beyond)
    exact = exam.exact(forced)
    right = np.array(
        [
            task.grade(given, wanted, question)
            for given, wanted, question in _texts(tokenizer, exam, written)
        ]
    )
    said = exam.evidence[..., 0] >= 0  # in one place
    depth = (exam.evidence[..., 0] / exam.asked * DEPTHS).astype(int).clip(0, DEPTHS - 1)
    return TaskCell(
        task=name,
        length=times * train_length,
        times=times,
        logit_base=logit_base,
        exact=float(exact.mean()),
        generated=float(right.mean()),
        whole=float(right.all(axis=1).mean()),
        deep=_mean(exact[said & (exam.distance > train_length)]),
        by_depth=tuple(_mean(exact[said & (depth == d)]) for d in range(DEPTHS)),
        examples=examples,
        chance=task.chance,
        guess=task.guess,
    )


def _mean(x: Float[np.ndarray, " n"]) -> float | None:
    return float(x.mean()) if x.size else None


def _texts(tokenizer: Tokenizer, exam: Exam, written: Int[np.ndarray, "n S"]):
    """Per test the texts of the answers that were written and of the right ones, and what was
    asked; the last answer goes on to the end of what was written."""
    length, count = exam.tokens.shape[1], exam.evidence.shape[1]
    for targets, numbers, own, asked in zip(
        exam.targets, exam.answers, written, exam.asked, strict=True
    ):
        given = []
        for number in range(1, count + 1):
            ids = own[:length][numbers == number]
            ids = np.concatenate([ids, own[length:]]) if number == count else ids
            given.append(tokenizer.decode(ids))
        wanted = [tokenizer.decode(targets[numbers == n]) for n in range(1, count + 1)]
        yield given, wanted, tokenizer.decode(targets[max(0, asked[0] - QUESTION) : asked[0]])


# ---------------------------------------------------------------- what the model answers


def answers(
    model: Decoder, exam: Exam, logit_base: float | None, beyond: int = 0
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "n T+beyond"]]:
    """The likeliest tokens after the right ones, and those after the model's own answers.

    What comes before the first answer of the exam is not predicted but as it should be.
    """
    start, base = int(exam.asked.min()), traced(logit_base)
    tokens = np.concatenate([exam.tokens, exam.targets[:, -1:]], axis=1)
    own = np.pad(exam.answers > 0, ((0, 0), (1, 0)))
    marked = 2 * tokens + own  # one array, as batches are cut
    both = in_batches(lambda x: _answer(model, x // 2, x % 2 > 0, base, start, beyond), marked)
    forced, written = exam.targets.copy(), np.pad(exam.targets, ((0, 0), (0, beyond)))
    forced[:, start:], written[:, start:] = both[:, 0, : forced[:, start:].shape[1]], both[:, 1]
    return forced, written


def _answer(
    model: Decoder,
    tokens: Int[np.ndarray, "B T+1"],
    own: Bool[np.ndarray, "B T+1"],
    base: Float[Array, ""],
    start: int,
    beyond: int,
) -> Int[Array, "B 2 S"]:
    """After the inputs from `start` on, of T and `beyond` more; `own`: those that are answers."""
    size = tokens.shape[1] - 1 - start + beyond
    state = new_state(model, tokens.shape[0], start + size)
    piece = min(PIECE, 1 << max(start - 1, 1).bit_length())
    state, _ = prefill(model, tokens[:, :start], state, logit_base=base, piece=piece)
    more, part = ((0, 0), (0, beyond)), slice(start, start + size)
    given, own = np.pad(tokens, more), np.pad(own, more, constant_values=True)
    return _continue(model, given[:, part], own[:, part], state, base)


@jax.jit
def _continue(
    model: Decoder,
    tokens: Int[Array, "B S"],
    own: Bool[Array, "B S"],
    state: DecoderState,
    base: Float[Array, ""],
) -> Int[Array, "B 2 S"]:
    """The likeliest token after each, as given and with the model's own where `own` says so."""
    tokens, own = place(tokens, "batch", None), place(own, "batch", None)
    likeliest = lambda h: place(jnp.argmax(model.logits(h), axis=-1), "batch", None)

    def write(carry, given):
        last, state = carry
        token, is_own = given
        token = jnp.where(is_own, last, token)[:, None]
        h, state = model.extend(token, state, logit_base=base)
        last = likeliest(h)[:, 0]
        return (last, state), last

    forced, _ = model.extend(tokens, state, logit_base=base)
    _, written = jax.lax.scan(write, (tokens[:, 0], state), (tokens.T, own.T))
    return jnp.stack([likeliest(forced), place(written.T, "batch", None)], axis=1)
