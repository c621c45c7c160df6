"""Facts to retrieve, hidden in real text: the task on which length generalization is measured.

A fact is `#q30;` (key q, value 30); a question is `?q30;`, of which the value is the answer. With
`separator="="` they are `#q=30;` and `?q=30;`, which takes one more step of induction to learn.
"""

import dataclasses
import random
import string
from array import array

import grain
import numpy as np
from jaxtyping import Float, Int

from hybridjax.config import UserError
from hybridjax.data.sources import Document
from hybridjax.data.text import documents
from hybridjax.data.tokenizer import Tokenizer


class Haystack:
    """Writes facts and questions into random windows of the embedded text of one split.

    Works on `array`, since at some hundred tokens that is several times faster than NumPy.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        split: str,
        *,
        key_length: int = 1,
        value_length: int = 2,
        separator: str = "",
        text: str | None = None,
    ):
        """`text`: hides the facts in this instead of the split's documents."""
        ids = {c: _one_token(tokenizer, c) for c in "#?; " + separator + string.digits}
        self._letters = [_one_token(tokenizer, c) for c in string.ascii_lowercase]
        self._digits = [ids[c] for c in string.digits]
        self._fact, self._question, self._end = ids["#"], ids["?"], ids[";"]
        self._separator = [ids[c] for c in separator]
        self._key_length, self._value_length = key_length, value_length
        self.value_start = 1 + key_length + len(separator)  # in a fact or question
        self.width = self.value_start + value_length + 1
        tokens = tokenizer.encode("\n".join(documents(split)) if text is None else text)
        tokens[(tokens == self._fact) | (tokens == self._question)] = ids[" "]  # none by accident
        self._text = array("i", tokens.astype(np.int32).tobytes())

    def __len__(self) -> int:
        """Tokens of text: longer rows repeat it."""
        return len(self._text)

    def dense(self, rng: random.Random, length: int, facts: int) -> tuple[array, array]:
        """Tokens and answers of a text with many questions.

        Half of its slots are used, for `facts` keys in random order: the first use of a key states
        the fact, every later one asks for it.
        """
        tokens, answers = self._window(rng, length), array("i", bytes(4 * length))
        slots = length // self.width
        offset = rng.randrange(length - slots * self.width + 1)
        stated, questions = [False] * facts, 0
        pairs = self._pairs(rng, facts)
        for slot in sorted(rng.sample(range(slots), slots // 2)):
            start, which = offset + slot * self.width, rng.randrange(facts)
            self._write(tokens, start, pairs[which], question=stated[which])
            if stated[which]:
                questions += 1
                self._mark(answers, start, questions)
            stated[which] = True
        return tokens, answers

    def needle(
        self, rng: random.Random, length: int, facts: int, depth: float | None = None
    ) -> tuple[array, array, int]:
        """Tokens, answers and the asked fact's start of a text with one question, at its end.

        `facts` of the same form lie at random places that do not overlap, the asked one at the
        fraction `depth` of the way from the start (0) to the question (1), or at random too.
        """
        end = length - self.width
        slots = end // self.width
        self.check(length, facts)
        asked = rng.randrange(slots) if depth is None else round(depth * (slots - 1))
        others = rng.sample(range(slots - 1), facts - 1)
        used = [asked] + [slot + (slot >= asked) for slot in others]
        offset = rng.randrange(end - slots * self.width + 1)
        tokens, answers = self._window(rng, length), array("i", bytes(4 * length))
        pairs = self._pairs(rng, facts)
        for slot, pair in zip(used, pairs, strict=True):
            self._write(tokens, offset + slot * self.width, pair, question=False)
        self._write(tokens, end, pairs[0], question=True)
        self._mark(answers, end, 1)
        return tokens, answers, offset + asked * self.width

    def questioned(
        self, rng: random.Random, length: int, facts: int
    ) -> tuple[array, list[array], list[int]]:
        """Tokens of a text with `facts` facts at random places, the question for each with its
        answer, and where each fact starts."""
        slots = length // self.width
        self.check(length, facts)
        offset = rng.randrange(length - slots * self.width + 1)
        starts = [offset + slot * self.width for slot in rng.sample(range(slots), facts)]
        tokens, questions = self._window(rng, length), []
        for start, pair in zip(starts, self._pairs(rng, facts), strict=True):
            self._write(tokens, start, pair, question=False)
            question = array("i", bytes(4 * self.width))
            self._write(question, 0, pair, question=True)
            questions.append(question)
        return tokens, questions, starts

    def check(self, length: int, facts: int) -> None:
        """Raises UserError if `length` tokens, or the keys there are, are too few for `facts`."""
        if length < (facts + 1) * self.width:
            raise UserError(
                f"{facts} facts and a question of {self.width} tokens need "
                f"{(facts + 1) * self.width} tokens, not {length}: lengthen seq_len or use "
                "fewer facts"
            )
        if facts > (keys := len(self._letters) ** self._key_length):
            raise UserError(f"{facts} facts need as many keys, not {keys}: raise key_length")

    def fits(self, length: int, facts: int) -> bool:
        """Whether `check` has nothing to say."""
        try:
            self.check(length, facts)
        except UserError:
            return False
        return True

    def _window(self, rng: random.Random, length: int) -> array:
        start = rng.randrange(len(self._text))
        window = self._text[start : start + length]
        while len(window) < length:
            window.extend(self._text[: length - len(window)])
        return window

    def _pairs(self, rng: random.Random, n: int) -> list[tuple[list[int], list[int]]]:
        """n pairs of key and value; the keys are distinct."""
        letters, pairs = self._letters, []
        for number in rng.sample(range(len(letters) ** self._key_length), n):
            key = []
            for _ in range(self._key_length):
                number, letter = divmod(number, len(letters))
                key.append(letters[letter])
            pairs.append((key, rng.choices(self._digits, k=self._value_length)))
        return pairs

    def _write(self, tokens: array, start: int, pair: tuple, *, question: bool) -> None:
        key, value = pair
        lead = self._question if question else self._fact
        words = array("i", [lead, *key, *self._separator, *value, self._end])
        tokens[start : start + self.width] = words

    def _mark(self, answers: array, start: int, number: int) -> None:
        start += self.value_start
        answers[start : start + self._value_length] = array("i", [number] * self._value_length)


class Retrieval:
    """Training documents of exactly `seq_len + 1` tokens, so that each fills one row.

    A share `dense` of them has many questions, the others have the form of the evaluation, one
    question at the end. Document i depends on (seed, split, i) alone; there is no last one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        facts: int = 4,
        dense: float = 0.75,
        key_length: int = 1,
        value_length: int = 2,
        separator: str = "",
        text_weight: float = 0.01,
    ):
        form = dict(key_length=key_length, value_length=value_length, separator=separator)
        self._haystack = Haystack(tokenizer, split, **form)
        self._haystack.check(seq_len + 1, facts)
        self._length, self._split, self._seed = seq_len + 1, split, seed
        self._facts, self._dense, self._text_weight = facts, dense, np.float32(text_weight)

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset:
        return grain.MapDataset.source(self)[shard].repeat()

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, index: int) -> Document:
        rng = random.Random(f"{self._seed} {self._split} {index}")
        if rng.random() < self._dense:
            tokens, answers = self._haystack.dense(rng, self._length, self._facts)
        else:
            tokens, answers, _ = self._haystack.needle(rng, self._length, self._facts)
        answers = np.frombuffer(answers, np.int32)
        weights = np.where(answers > 0, np.float32(1), self._text_weight)
        return dict(tokens=np.frombuffer(tokens, np.int32), loss_weights=weights, answers=answers)


@dataclasses.dataclass(frozen=True)
class Needles:
    """Tests with one question each, at the end: `n` rows of `T` inputs and targets."""

    tokens: Int[np.ndarray, "n T"]
    targets: Int[np.ndarray, "n T"]
    answers: Int[np.ndarray, "n T"]  # 1 where the target is a digit of the answer
    prompts: Int[np.ndarray, "n P"]  # all before the answer, to be continued by generation
    values: Int[np.ndarray, "n value"]
    distance: Int[np.ndarray, " n"]  # the prompt's last `distance` tokens just hold the fact

    def exact(self, predictions: Int[np.ndarray, "n T"]) -> Float[np.ndarray, " n"]:
        """Teacher-forced exact match: 1 where the whole answer is predicted."""
        return ((predictions == self.targets) | (self.answers == 0)).all(1).astype(np.float32)


def needle_batch(
    haystack: Haystack,
    seed: int,
    n: int,
    length: int,
    *,
    facts: int = 4,
    depth: float | None = None,
) -> Needles:
    """n tests of `length` inputs with `facts` facts each: one asked for, the others distractors.

    They depend on (seed, length, facts, depth) and each on its number, so that a larger n adds
    tests to the same ones.
    """
    rows, answers, starts = [], [], []
    for i in range(n):
        rng = random.Random(f"{seed} {length} {facts} {depth} {i}")
        row, answer, start = haystack.needle(rng, length + 1, facts, depth)
        rows.append(np.frombuffer(row, np.int32))
        answers.append(np.frombuffer(answer, np.int32))
        starts.append(start)
    rows, answers = np.stack(rows), np.stack(answers)
    prompt = length + 1 - haystack.width + haystack.value_start
    return Needles(
        tokens=rows[:, :-1],
        targets=rows[:, 1:],
        answers=answers[:, 1:],
        prompts=rows[:, :prompt],
        values=rows[:, prompt:-1],
        distance=prompt - np.array(starts, np.int32),
    )


def _one_token(tokenizer: Tokenizer, character: str) -> int:
    ids = tokenizer.encode(character)
    if len(ids) != 1:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no token of its own for {character!r}: the "
            "retrieval task needs one for each character of a fact"
        )
    return int(ids[0])
