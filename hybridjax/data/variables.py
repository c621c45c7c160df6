"""Variable tracking: chains of assignments hidden in real text (RULER, arXiv 2404.06654).

`#a=30;` gives a variable a value, and `#b=a;` hands it on. `?b=30;` asks for the value, which takes
a hop per link; `?30=a,b;` asks for all names of a value, in order of assignment.
"""

import random

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
)
from hybridjax.data.tasks import Example, Task
from hybridjax.data.tokenizer import Tokenizer


class Variables(Task):
    """`chains` of a value and `hops` links; the question is about one, the others distract."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        chains: int = 2,
        hops: int = 2,
        ask: str = "value",
        name_length: int = 1,
        value_length: int = 2,
        together: int = 1,
        dense: float = 0.75,
        text_weight: float = 0.01,
    ):
        """Args:
        ask: "value", of the last variable of a chain (in training also of those before it); or
            "names", each of which is an answer.
        together: this many assignments lie side by side, so that one chunk holds several.
        """
        if ask not in ("value", "names"):
            raise UserError(f"ask is {ask!r}: use 'value' or 'names'")
        self._text = Text(tokenizer, split, separators="=,")
        self._chains, self._hops, self._ask = chains, hops, ask
        self._name_length, self._value_length, self._together = name_length, value_length, together
        of_value = 3 + name_length + value_length
        of_name = 3 + 2 * name_length
        of_names = 2 + value_length + (hops + 1) * (1 + name_length)
        self._width, self._question = max(of_value, of_name), of_value
        self._slot = self._width
        if ask == "names":
            self._question, self._slot = of_names, max(self._width, of_names)
        super().__init__(seq_len, split, seed, dense=dense, text_weight=text_weight)
        self.chance, self.guess = 10.0**-value_length, 1 / chains
        if ask == "names":
            self.chance, self.guess = 26.0**-name_length, 1 / (chains * (hops + 1))

    def check(self, length: int) -> None:
        count = self._chains * (self._hops + 1)
        if min(self._chains, self._hops + 1) < 1:
            raise UserError(f"chains is {self._chains} and hops {self._hops}: use 1, 0 or more")
        if count > 26**self._name_length:
            raise UserError(f"{count} variables need as many names: raise name_length")
        if self._chains > 10**self._value_length:
            raise UserError(f"{self._chains} chains need as many values: raise value_length")
        check_room(length, count, self._width, self._question, self._together, "assignments")

    def example(self, rng: random.Random, length: int) -> Example:
        return ask_at_end(
            self._text, rng, length, self._clues, clues=self._chains * (self._hops + 1),
            width=self._width, asked=(self._hops,), tail=self._question, together=self._together,
        )  # fmt: skip

    def lesson(self, rng: random.Random, length: int) -> Example:
        form = dict(width=self._slot, together=self._together)
        return ask_throughout(self._text, rng, length, self._clues, **form)

    def grade(self, written, right, question) -> list[bool]:
        """Names in any order, as RULER's `string_match_all` has it."""
        return [r in written for r in right]

    def _clues(self, rng: random.Random) -> list[Clue]:
        """The chains one after the other, each from its value to its last name."""
        length, spell = self._hops + 1, self._text.spell
        names = self._text.words(rng, self._chains * length, self._name_length)
        values = rng.sample(range(10**self._value_length), self._chains)
        clues = []
        for chain, number in enumerate(values):
            value = spell(f"{number:0{self._value_length}}")
            first = chain * length
            mine = names[first : first + length]
            for hop, name in enumerate(mine):
                told = mine[hop - 1] if hop else value
                statement = [*spell(STATES), *name, *spell("="), *told, *spell(ENDS)]
                question, answers = self._of_value(name, value, first)
                if self._ask == "names":
                    last = hop == self._hops
                    question, answers = self._of_names(value, mine, first) if last else (None, ())
                after = first + hop - 1 if hop else None
                clues.append(Clue(statement, question, answers, after))
        return clues

    def _of_value(self, name: list[int], value: list[int], root: int):
        spell = self._text.spell
        start = 2 + len(name)
        question = [*spell(ASKS), *name, *spell("="), *value, *spell(ENDS)]
        return question, ((start, start + len(value), root),)

    def _of_names(self, value: list[int], names: list[list[int]], first: int):
        spell, answers = self._text.spell, []
        question = [*spell(ASKS), *value]
        for number, name in enumerate(names):
            question += spell("," if number else "=")
            answers.append((len(question), len(question) + len(name), first + number))
            question += name
        return [*question, *spell(ENDS)], tuple(answers)
