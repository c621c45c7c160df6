"""Statements written over real text, and questions that they answer: what most tasks are made of.

Works on `array`, since at some hundred tokens that is several times faster than NumPy.
"""

import dataclasses
import functools
import random
import string
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from hybridjax.config import UserError
from hybridjax.data.tasks import Example
from hybridjax.data.text import documents
from hybridjax.data.tokenizer import Tokenizer

STATES, ASKS, ENDS = "#?;"


@dataclasses.dataclass(frozen=True)
class Clue:
    """A statement, and a question that can be asked once it was made."""

    statement: list[int]
    question: list[int] | None = None
    # From where to where in the question an answer stands, and which clue's statement says it.
    answers: tuple[tuple[int, int, int], ...] = ()
    after: int | None = None  # an earlier clue that must be stated before this one


Draw = Callable[[random.Random], list[Clue]]


class Text:
    """Random windows of the embedded text of one split, which has no mark of a fact in it."""

    def __init__(
        self, tokenizer: Tokenizer, split: str, *, separators: str = "", text: str | None = None
    ):
        """`text`: to be used instead of the split's documents."""
        characters = STATES + ASKS + ENDS + " " + separators
        characters += string.digits + string.ascii_lowercase
        self._ids = {c: _one_token(tokenizer, c) for c in characters}
        self.letters = [self._ids[c] for c in string.ascii_lowercase]
        self.digits = [self._ids[c] for c in string.digits]
        self._tokens = _of_split(tokenizer, split) if text is None else _clean(tokenizer, text)

    def __len__(self) -> int:
        """Tokens of text: longer windows repeat it."""
        return len(self._tokens)

    def window(self, rng: random.Random, length: int) -> array:
        start = rng.randrange(len(self._tokens))
        window = self._tokens[start : start + length]
        while len(window) < length:
            window.extend(self._tokens[: length - len(window)])
        return window

    def spell(self, word: str) -> list[int]:
        """A token for each character."""
        return [self._ids[c] for c in word]

    def words(self, rng: random.Random, n: int, letters: int) -> list[list[int]]:
        """n distinct words of so many random letters."""
        words = []
        for number in rng.sample(range(len(self.letters) ** letters), n):
            word = []
            for _ in range(letters):
                number, letter = divmod(number, len(self.letters))
                word.append(self.letters[letter])
            words.append(word)
        return words


@functools.lru_cache(maxsize=4)  # a run has many tasks over one text
def _of_split(tokenizer: Tokenizer, split: str) -> array:
    return _clean(tokenizer, "\n".join(documents(split)))


def _clean(tokenizer: Tokenizer, text: str) -> array:
    """The text's tokens, with spaces for what could be taken for the mark of a fact."""
    marks = [_one_token(tokenizer, mark) for mark in (STATES, ASKS)]
    tokens = tokenizer.encode(text)
    tokens[np.isin(tokens, marks)] = _one_token(tokenizer, " ")
    return array("i", tokens.astype(np.int32).tobytes())


def _one_token(tokenizer: Tokenizer, character: str) -> int:
    ids = tokenizer.encode(character)
    if len(ids) != 1:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no token of its own for {character!r}: facts "
            "that are hidden in text need one for each of their characters"
        )
    return int(ids[0])


class Page:
    """A text that is being written over."""

    def __init__(self, tokens: array):
        self._tokens, self._answers = tokens, array("i", bytes(4 * len(tokens)))
        self._evidence: list[tuple[int, int]] = []
        self._stated: dict[int, tuple[int, int]] = {}

    def write(self, start: int, words: Sequence[int]) -> int:
        """Where it ends."""
        stop = start + len(words)
        self._tokens[start:stop] = array("i", words)
        return stop

    def state(self, start: int, number: int, clue: Clue) -> None:
        """`number`: of the clue, by which answers name it."""
        self._stated[number] = start, self.write(start, clue.statement)

    def states(self, number: int) -> bool:
        return number in self._stated

    def ask(self, start: int, clue: Clue) -> int:
        """Writes the question with its answers; where it ends."""
        for first, last, source in clue.answers:
            self._evidence.append(self._stated.get(source, (-1, -1)))
            number = array("i", [len(self._evidence)])
            self._answers[start + first : start + last] = number * (last - first)
        return self.write(start, clue.question)

    def example(self) -> Example:
        evidence = np.array(self._evidence, np.int32).reshape(-1, 2)
        return Example(
            np.frombuffer(self._tokens, np.int32), np.frombuffer(self._answers, np.int32), evidence
        )


def ask_throughout(
    text: Text, rng: random.Random, length: int, draw: Draw, *, width: int, together: int = 1
) -> Example:
    """A text with many questions: half of its slots are used, for the clues in random order.

    The first use of a clue states it, or what it builds on; every later one asks for it.

    Args:
      width: of a slot, which the longest statement or question just fills.
      together: this many used slots are side by side.
    """
    page, slots = Page(text.window(rng, length)), length // width
    offset = rng.randrange(length - slots * width + 1)
    clues = draw(rng)
    for slot in sorted(scattered(rng, slots, slots // 2, together)):
        start, which = offset + slot * width, rng.randrange(len(clues))
        while (before := clues[which].after) is not None and not page.states(before):
            which = before
        if not page.states(which):
            page.state(start, which, clues[which])
        elif clues[which].question:
            page.ask(start, clues[which])
    return page.example()


def ask_at_end(
    text: Text, rng: random.Random, length: int, draw: Draw, *, clues: int, width: int,
    asked: Sequence[int] = (0,), tail: int, depth: float | None = None, together: int = 1,
) -> Example:  # fmt: skip
    """A text with clues at random places that do not overlap, and questions at its end.

    Args:
      clues: how many `draw` draws.
      width: of a slot, which the longest statement just fills.
      asked: which clues the questions are of, in their order.
      tail: tokens that these take.
      depth: the first clue's place, from the start (0) to the questions (1); None: random.
      together: this many clues are side by side.
    """
    end = length - tail
    slots = end // width
    places = _places(rng, slots, clues, depth, together)
    offset = rng.randrange(end - slots * width + 1)
    page, drawn = Page(text.window(rng, length)), draw(rng)
    for number, (place, clue) in enumerate(zip(_in_order(places, drawn), drawn, strict=True)):
        page.state(offset + place * width, number, clue)
    for number in asked:
        end = page.ask(end, drawn[number])
    return page.example()


def check_room(length: int, clues: int, width: int, tail: int, together: int, name: str) -> None:
    """Raises UserError if `ask_at_end` needs more than `length` tokens."""
    if together < 1:
        raise UserError(f"together is {together}: it must be at least 1")
    needed = -(-clues // together) * together * width + tail
    if length < needed:
        raise UserError(
            f"{clues} {name} of {width} tokens and questions of {tail} tokens need {needed} "
            f"tokens, not {length}: lengthen seq_len or use fewer {name}"
        )


def scattered(rng: random.Random, slots: int, count: int, together: int = 1) -> list[int]:
    """`count` random slots, `together` of them side by side; fewer where runs do not fit."""
    if together == 1:
        return rng.sample(range(slots), count)
    runs = slots // together
    chosen = rng.sample(range(runs), min(runs, -(-count // together)))
    return [run * together + i for run in chosen for i in range(together)][:count]


def _places(
    rng: random.Random, slots: int, count: int, depth: float | None, together: int
) -> list[int]:
    """The same, where the first of the slots lies at `depth`, or anywhere."""
    runs = slots // together
    first = rng.randrange(runs) if depth is None else round(depth * (runs - 1))
    others = rng.sample(range(runs - 1), -(-count // together) - 1)
    chosen = [first] + [run + (run >= first) for run in others]
    if together == 1:
        return chosen
    places = [run * together + i for run in chosen for i in range(together)]
    lead = places.pop(rng.randrange(together))
    rng.shuffle(places)
    return [lead, *places[: count - 1]]


def _in_order(places: Sequence[int], clues: Sequence[Clue]) -> list[int]:
    """The places, exchanged so that each clue comes after the one it builds on."""
    chains: dict[int, list[int]] = {}
    for number, clue in enumerate(clues):
        chain = [number] if clue.after is None else [*chains.pop(clue.after), number]
        chains[number] = chain
    ordered = list(places)
    for chain in chains.values():
        for number, place in zip(chain, sorted(places[i] for i in chain), strict=True):
            ordered[number] = place
    return ordered
