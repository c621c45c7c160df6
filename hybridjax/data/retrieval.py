"""Facts to retrieve, hidden in real text: the task on which length generalization is measured.

A fact is `#q30;` (key q, value 30); a question is `?q30;`, of which the value is the answer. With
`separator="="` they are `#q=30;` and `?q=30;`, which takes one more step of induction to learn.
One question is RULER's S-NIAH, several its MQ-NIAH (arXiv 2404.06654), at the level of tokens.
"""

import random
from array import array
from itertools import cycle, islice

from hybridjax.config import UserError
from hybridjax.data.hiding import (
    ASKS,
    ENDS,
    STATES,
    Clue,
    Text,
    ask_at_end,
    ask_throughout,
    check_room,
    scattered,
)
from hybridjax.data.tasks import Exam, Example, Task
from hybridjax.data.tokenizer import Tokenizer


class Haystack:
    """Writes facts and questions into random windows of the embedded text of one split."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        split: str,
        *,
        key_length: int = 1,
        value_length: int = 2,
        separator: str = "",
        alike: int = 0,
        decoys: int = 0,
        together: int = 1,
        text: str | None = None,
    ):
        """Args:
        alike: for each key so many others that differ from it in one letter.
        decoys: so many words that could be taken for facts: in turn one with a fact's key and
            another value but none of its marks, and a number.
        together: this many facts lie side by side, so that one chunk holds several.
        text: hides the facts in this instead of the split's documents.
        """
        if not 0 <= alike <= 25:
            raise UserError(f"alike is {alike}: a letter has 0 to 25 others in its place")
        self._text = Text(tokenizer, split, separators=separator, text=text)
        self._key_length, self.value_length, self._separator = key_length, value_length, separator
        self._alike, self._decoys, self._together = alike, decoys, together
        self.value_start = 1 + key_length + len(separator)  # in a fact or question
        self.width = self.value_start + value_length + 1

    def __len__(self) -> int:
        """Tokens of text: longer rows repeat it."""
        return len(self._text)

    def dense(self, rng: random.Random, length: int, facts: int) -> Example:
        """A text with many questions for so many facts."""
        form = dict(width=self.width, together=self._together)
        return ask_throughout(self._text, rng, length, lambda r: self._clues(r, facts), **form)

    def needle(
        self,
        rng: random.Random,
        length: int,
        facts: int,
        depth: float | None = None,
        queries: int = 1,
    ) -> Example:
        """A text with so many facts, of which the questions at the end ask for the first.

        The first lies at the fraction `depth` of the way from the start (0) to the questions (1),
        or at random, as all others do.
        """
        self.check(length, facts, queries)
        form = dict(width=self.width, tail=queries * self.width, together=self._together)
        return ask_at_end(
            self._text, rng, length, lambda r: self._clues(r, facts), clues=facts + self._decoys,
            asked=range(queries), depth=depth, **form,
        )  # fmt: skip

    def questioned(
        self, rng: random.Random, length: int, facts: int
    ) -> tuple[array, list[list[int]], list[int]]:
        """Tokens of a text with `facts` facts at random places, the question for each with its
        answer, and where each fact starts."""
        slots = length // self.width
        self.check(length, facts)
        offset = rng.randrange(length - slots * self.width + 1)
        places = scattered(rng, slots, facts + self._decoys, self._together)
        starts = [offset + place * self.width for place in places]
        tokens, clues = self._text.window(rng, length), self._clues(rng, facts)
        for start, clue in zip(starts, clues, strict=True):
            tokens[start : start + self.width] = array("i", clue.statement)
        return tokens, [clue.question for clue in clues[:facts]], starts[:facts]

    def check(self, length: int, facts: int, queries: int = 1) -> None:
        """Raises UserError if `length` tokens, or the keys there are, are too few for `facts`."""
        clues, name = facts + self._decoys, "facts and decoys" if self._decoys else "facts"
        check_room(length, clues, self.width, queries * self.width, self._together, name)
        if not 1 <= queries <= facts:
            raise UserError(f"queries is {queries}: it must be from 1 to the {facts} facts")
        if facts > (keys := len(self._text.letters) ** self._key_length):
            raise UserError(f"{facts} facts need as many keys, not {keys}: raise key_length")

    def fits(self, length: int, facts: int) -> bool:
        """Whether `check` has nothing to say."""
        try:
            self.check(length, facts)
        except UserError:
            return False
        return True

    def _clues(self, rng: random.Random, n: int) -> list[Clue]:
        """n facts of distinct keys, then the decoys."""
        spell, clues, answer = self._text.spell, [], (self.value_start, self.width - 1)
        keys = self._keys(rng, n)
        digits = lambda count: rng.choices(self._text.digits, k=count)
        words = ([*key, *spell(self._separator), *digits(self.value_length)] for key in cycle(keys))
        for number, word in enumerate(islice(words, n)):
            fact, question = ([*spell(mark), *word, *spell(ENDS)] for mark in (STATES, ASKS))
            clues.append(Clue(fact, question, ((*answer, number),)))
        any_token = lambda: self._text.window(rng, 1)
        for number in range(self._decoys):
            named = [*any_token(), *next(words), *any_token()]
            clues.append(Clue(digits(self.width) if number % 2 else named))
        return clues

    def _keys(self, rng: random.Random, n: int) -> list[list[int]]:
        """n distinct keys: first those that have nothing to do with each other, then the rest."""
        apart = -(-n // (self._alike + 1))
        keys = self._text.words(rng, apart, self._key_length)
        while len(keys) < n:
            key = list(keys[(len(keys) - apart) % apart])
            key[rng.randrange(len(key))] = rng.choice(self._text.letters)
            if key not in keys:
                keys.append(key)
        return keys


class Retrieval(Task):
    """One question or several, each for one of `facts` facts; the rest are distractors."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        facts: int = 4,
        queries: int = 1,
        dense: float = 0.75,
        key_length: int = 1,
        value_length: int = 2,
        separator: str = "",
        alike: int = 0,
        decoys: int = 0,
        together: int = 1,
        text_weight: float = 0.01,
    ):
        form = dict(key_length=key_length, value_length=value_length, separator=separator)
        form.update(alike=alike, decoys=decoys, together=together)
        self._haystack = Haystack(tokenizer, split, **form)
        self._facts, self._queries = facts, queries
        self.chance, self.guess = 10.0**-value_length, 1 / facts
        super().__init__(seq_len, split, seed, dense=dense, text_weight=text_weight)

    def check(self, length: int) -> None:
        self._haystack.check(length, self._facts, self._queries)

    def example(self, rng: random.Random, length: int) -> Example:
        return self._haystack.needle(rng, length, self._facts, queries=self._queries)

    def lesson(self, rng: random.Random, length: int) -> Example:
        return self._haystack.dense(rng, length, self._facts)


def needle_batch(
    haystack: Haystack,
    seed: int,
    n: int,
    length: int,
    *,
    facts: int = 4,
    depth: float | None = None,
) -> Exam:
    """n tests of `length` inputs with `facts` facts each: one asked for, the others distractors.

    They depend on (seed, length, facts, depth) and each on its number, so that a larger n adds
    tests to the same ones.
    """
    seeds = (f"{seed} {length} {facts} {depth} {i}" for i in range(n))
    return Exam.of(haystack.needle(random.Random(s), length + 1, facts, depth) for s in seeds)
