"""Frequent words: which coded words occur most often (RULER, arXiv 2404.06654, "FWE").

Words `#abc;` lie over real text, the word of rank k in N k^-2 / zeta(2) of N places, and
`?abc,def,ghi;` asks for the most frequent, in their order. Of rank 1, which RULER turns to dots,
the text itself is left.
"""

import itertools
import math
import random

from hybridjax.config import UserError
from hybridjax.data.hiding import ASKS, ENDS, STATES, Clue, Page, Text
from hybridjax.data.tasks import Example, Task
from hybridjax.data.tokenizer import Tokenizer

ZETA_2 = math.pi**2 / 6


class FrequentWords(Task):
    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        letters: int = 3,
        top: int = 3,
        text_weight: float = 0.01,
    ):
        """`letters`: of a word; `top`: words asked for."""
        self._text = Text(tokenizer, split, separators=",")
        self._letters, self._top = letters, top
        self._width, self._question = letters + 2, 1 + top * (letters + 1)
        super().__init__(seq_len, split, seed, dense=0.0, text_weight=text_weight)
        self.chance, self.guess = 26.0**-letters, 1 / len(self._counts(seq_len + 1))

    def check(self, length: int) -> None:
        counts = [*self._counts(length), 0]
        apart = all(a > b for a, b in itertools.pairwise(counts[: self._top + 1]))
        if len(counts) <= self._top or not apart:
            raise UserError(
                f"in {length} tokens the {self._top} most frequent words of {self._letters} "
                "letters occur too seldom to be told apart: lengthen seq_len"
            )
        if len(counts) > 26**self._letters:
            raise UserError(f"{len(counts)} words need as many spellings: raise letters")

    def example(self, rng: random.Random, length: int) -> Example:
        self.check(length)
        end = length - self._question
        page, slots = Page(self._text.window(rng, length)), end // self._width
        offset = rng.randrange(end - slots * self._width + 1)
        counts, spell = self._counts(length), self._text.spell
        words = self._text.words(rng, len(counts), self._letters)
        copies = [w for w, n in zip(words, counts, strict=True) for _ in range(n)]
        for slot, word in zip(rng.sample(range(slots), len(copies)), copies, strict=True):
            page.write(offset + slot * self._width, [*spell(STATES), *word, *spell(ENDS)])
        page.ask(end, self._asking(words[: self._top]))
        return page.example()

    def grade(self, written, right, question) -> list[bool]:
        """Words in any order, as RULER's `string_match_all` has it."""
        return [r in written for r in right]

    def _counts(self, length: int) -> list[int]:
        """How often each word occurs, from rank 2 on."""
        places = (length - self._question) // self._width / ZETA_2
        return [int(places / k**2) for k in range(2, math.isqrt(max(0, int(places))) + 1)]

    def _asking(self, words: list[list[int]]) -> Clue:
        spell, answers = self._text.spell, []
        question = spell(ASKS)
        for number, word in enumerate(words):
            question += spell(",") if number else []
            answers.append((len(question), len(question) + len(word), -1))
            question += word
        return Clue([], [*question, *spell(ENDS)], tuple(answers))
