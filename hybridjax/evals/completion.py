"""Completions of many prompts, each up to a stop string.

Prompts of like lengths share a batch, which is read in pieces and then written token by token; a
row that has come to its end is not looked at any more.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals.batches import TOKENS, traced
from hybridjax.generate import PIECE, decode, new_state, prefill, sample
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import ways

Prompt = Int[np.ndarray, " n"]


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    until: Sequence[str] = (),
    logit_base: float | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[str]:
    """What follows each prompt, of at most `tokens` tokens, without the first of the strings
    `until` that comes up, and what is behind it."""
    draw = sampler(temperature, top_k, top_p)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts: dict[int, str] = {}
    for batch, room in _batches(order, prompts, tokens):
        rows = [prompts[i] for i in batch]
        piece = min(PIECE, _power_of_two(len(rows[0])))
        key = jax.random.fold_in(jax.random.key(seed), len(texts))
        state = new_state(model, len(rows), room)
        prefix = prefill(model, rows, state, logit_base=traced(logit_base), piece=piece)
        written = decode(model, prefix, key, draw, traced(logit_base))
        answers = [Answer(tokenizer, until) for _ in rows]
        for step in itertools.islice(written, tokens):
            for answer, token in zip(answers, step, strict=True):
                answer.add(int(token))
            if all(answer.ended for answer in answers):
                break
        texts.update({i: answer.text for i, answer in zip(batch, answers, strict=True)})
    return [texts[i] for i in range(len(prompts))]


class Answer:
    """The text of one row so far, and whether it has ended."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]):
        self.text, self.ended = "", False
        self._tokenizer, self._until, self._ids = tokenizer, [s for s in until if s], []

    def add(self, token: int) -> None:
        if self.ended or token == self._tokenizer.eos:
            self.ended = True
            return
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        ends = [at for stop in self._until if (at := text.find(stop)) >= 0]
        self.text, self.ended = text[: min(ends, default=None)], bool(ends)


@functools.cache
def sampler(temperature: float, top_k: int, top_p: float):
    """One object for equal arguments: decoding is compiled for each."""
    return functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)


def _batches(
    order: Sequence[int], prompts: Sequence[Prompt], tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts and the room that their states need; few shapes, so few programs. The
    last batch is filled up with its last prompt."""
    start = 0
    while start < len(order):
        room = _power_of_two(len(prompts[order[start]]) + tokens)
        size = max(1, min(len(order), TOKENS // room))
        size = -(-size // ways("batch")) * ways("batch")
        batch = list(order[start : start + size])
        start += len(batch)
        yield batch + [batch[-1]] * (size - len(batch)), room


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()
