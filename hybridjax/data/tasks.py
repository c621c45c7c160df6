"""Long-context tasks: text with facts hidden in it, and questions that it answers.

A task is a source of training documents and, with the same code, a maker of tests of any length:
what is trained and what is asked is one object, named in `config.data.sources` (weight 0: asked
only) and listed in `config.evaluation.tasks`.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence

import grain
import numpy as np
from jaxtyping import Float, Int

from hybridjax.data.sources import Document


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and the questions in it."""

    tokens: Int[np.ndarray, " n"]
    answers: Int[np.ndarray, " n"]  # 0, or i at the tokens of the i-th answer
    evidence: Int[np.ndarray, "answers 2"]  # from where to where the text says it; -1: nowhere


@dataclasses.dataclass(frozen=True)
class Exam:
    """`n` examples of one length as rows of `T` inputs and targets, with `A` answers each."""

    tokens: Int[np.ndarray, "n T"]
    targets: Int[np.ndarray, "n T"]
    answers: Int[np.ndarray, "n T"]  # 0, or a where the target is of the a-th answer
    evidence: Int[np.ndarray, "n A 2"]  # in inputs: from where to where the text says the answer

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Exam":
        fields = zip(*((e.tokens, e.answers, e.evidence) for e in examples), strict=True)
        rows, answers, evidence = map(np.stack, fields)
        return cls(rows[:, :-1], rows[:, 1:], answers[:, 1:], evidence)

    @property
    def asked(self) -> Int[np.ndarray, "n A"]:
        """The input after which each answer begins."""
        count = self.evidence.shape[1]
        return np.stack([(self.answers == a).argmax(1) for a in range(1, count + 1)], axis=1)

    @property
    def distance(self) -> Int[np.ndarray, "n A"]:
        """The last `distance` inputs before an answer just hold what says it."""
        return self.asked + 1 - self.evidence[..., 0]

    def exact(self, predictions: Int[np.ndarray, "n T"]) -> Float[np.ndarray, "n A"]:
        """1 for each answer of which every token is predicted."""
        right = predictions == self.targets
        numbers = range(1, self.evidence.shape[1] + 1)
        each = [(right | (self.answers != a)).all(1) for a in numbers]
        return np.stack(each, axis=1).astype(np.float32)


class Task:
    """Training documents of exactly `seq_len + 1` tokens, so that each fills a row, and tests.

    Document i depends on (seed, split, i) alone; there is no last one. A share `dense` of them has
    questions throughout, the others have the form of the tests, questions at the end.

    Attributes:
      chance: that an answer in the right form, drawn blindly, is right.
      guess: that one of those that stand in the text, drawn blindly, is right.
      beyond: tokens that a model may write after the row, where it must end an answer itself.
    """

    chance: float
    guess: float
    beyond: int = 0

    def __init__(self, seq_len: int, split: str, seed: int, *, dense: float, text_weight: float):
        self._length, self._split, self._seed = seq_len + 1, split, seed
        self._dense, self._text_weight = dense, np.float32(text_weight)
        self.check(self._length)

    def check(self, length: int) -> None:
        """Raises UserError if an example needs more than `length` tokens."""
        raise NotImplementedError

    def example(self, rng: random.Random, length: int) -> Example:
        """A text of `length` tokens, of which the questions with their answers are the last."""
        raise NotImplementedError

    def lesson(self, rng: random.Random, length: int) -> Example:
        """A text of `length` tokens with many questions in it."""
        return self.example(rng, length)

    def grade(self, written: Sequence[str], right: Sequence[str], question: str) -> list[bool]:
        """For each of the right answers of a test whether the model has written it.

        `question`: the text before the first of them.
        """
        return [w == r for w, r in zip(written, right, strict=True)]

    def exam(self, n: int, length: int) -> Exam:
        """n tests of `length` inputs; each depends on its number, so more extend fewer."""
        seeds = (f"{self._seed} {self._split} exam {length} {i}" for i in range(n))
        return Exam.of(self.example(random.Random(seed), length + 1) for seed in seeds)

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset:
        return grain.MapDataset.source(self)[shard].repeat()

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, index: int) -> Document:
        rng = random.Random(f"{self._seed} {self._split} {index}")
        make = self.lesson if rng.random() < self._dense else self.example
        example = make(rng, self._length)
        weights = np.where(example.answers > 0, np.float32(1), self._text_weight)
        return dict(tokens=example.tokens, loss_weights=weights, answers=example.answers)
