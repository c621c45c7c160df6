"""People who move about and carry things, told between the sentences of real text.

Tasks qa1 to qa3 of BABILong (arXiv 2406.10149), from a simulator of our own in the language of bAbI
(arXiv 1502.05698): "Mary went to the office." ... "Where is Mary?". The name of the place is the
answer. Scores are not those of the published samples.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Sequence

import numpy as np

from hybridjax.config import UserError
from hybridjax.data.tasks import Example, Task
from hybridjax.data.text import documents
from hybridjax.data.tokenizer import Tokenizer

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TAKES = ("got", "took", "grabbed", "picked up")
DROPS = ("dropped", "discarded", "put down", "left")
TASKS = ("qa1", "qa2", "qa3")
SHORTEST = 10  # tokens of a sentence of the text; shorter ones are left out


@dataclasses.dataclass(frozen=True)
class Line:
    """A sentence of a story, or a question with its answer."""

    words: str
    answer: str | None = None
    source: int | None = None  # the sentence, by its number among them, that names the answer


class World:
    """Who and what is where. A place comes with the number of the sentence that named it."""

    def __init__(self, rng: random.Random, carrying: bool):
        """`carrying`: things are taken along and put down."""
        self._rng, self._carrying, self._told = rng, carrying, 0
        self._people: dict[str, tuple[str, int]] = {}
        self._holder: dict[str, str] = {}
        self._trails: dict[str, list[tuple[str, int]]] = {}  # the places of a thing, in order

    def happen(self) -> Line:
        """One more thing happens."""
        person = self._rng.choice(PEOPLE)
        within = self._within(person) if self._carrying else []
        held = [thing for thing, holder in self._holder.items() if holder == person]
        kinds = ["move"] + ["take"] * bool(within) + ["drop"] * bool(held)
        match self._rng.choice(kinds):
            case "take":
                line = self._take(person, self._rng.choice(within))
            case "drop":
                thing = self._rng.choice(held)
                del self._holder[thing]
                line = f"{person} {self._rng.choice(DROPS)} the {thing}."
            case _:
                line = self._move(person, held)
        self._told += 1
        return Line(line)

    def question(self, task: str) -> Line | None:
        """A question whose answer the story has told; None if there is none yet."""
        if task == "qa1":
            if not self._people:
                return None
            person = self._rng.choice(sorted(self._people))
            return Line(f"Where is {person}?", *self._people[person])
        least = 1 if task == "qa2" else 2
        known = sorted(t for t, trail in self._trails.items() if len(trail) >= least)
        if not known:
            return None
        thing = self._rng.choice(known)
        if task == "qa2":
            return Line(f"Where is the {thing}?", *self._trails[thing][-1])
        before, (last, _) = self._trails[thing][-2:]
        return Line(f"Where was the {thing} before the {last}?", *before)

    def _within(self, person: str) -> list[str]:
        """Things that are free, and where the person is or nobody knows."""
        here = self._people.get(person, (None, 0))[0]
        place = lambda thing: self._trails[thing][-1][0] if thing in self._trails else here
        return [t for t in THINGS if here and t not in self._holder and place(t) == here]

    def _take(self, person: str, thing: str) -> str:
        self._holder[thing] = person
        if thing not in self._trails:
            self._trails[thing] = [self._people[person]]
        return f"{person} {self._rng.choice(TAKES)} the {thing}."

    def _move(self, person: str, held: Sequence[str]) -> str:
        here = self._people.get(person, (None, 0))[0]
        place = self._rng.choice([p for p in PLACES if p != here])
        self._people[person] = place, self._told
        for thing in held:
            self._trails[thing].append((place, self._told))
        return f"{person} {self._rng.choice(MOVES)} the {place}."


def longest_line(task: str) -> str:
    """A sentence of the task's stories than which none is longer."""
    by_length = lambda words: max(words, key=len)
    move = f"{by_length(PEOPLE)} {by_length(MOVES)} the {by_length(PLACES)}."
    take = f"{by_length(PEOPLE)} {by_length(TAKES + DROPS)} the {by_length(THINGS)}."
    return move if task == "qa1" else by_length((move, take))


class BABILong(Task):
    """A story of so many `facts`, and a question at the end."""

    chance = guess = 1 / len(PLACES)
    beyond = 16

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        task: str = "qa1",
        facts: int = 10,
        dense: float = 0.5,
        text_weight: float = 0.01,
    ):
        """`task`: "qa1" (where someone is), "qa2" (something), "qa3" (where that was before)."""
        if task not in TASKS:
            raise UserError(f"task is {task!r}: use one of {', '.join(TASKS)}")
        if facts < (least := TASKS.index(task) + 1):
            raise UserError(f"facts is {facts}: {task} needs at least {least}")
        self._tokenizer, self._task, self._facts = tokenizer, task, facts
        self._sentences = _sentences(tokenizer, split)
        self._longest = len(self._encode(longest_line(task)))
        super().__init__(seq_len, split, seed, dense=dense, text_weight=text_weight)

    def check(self, length: int) -> None:
        needed = (self._facts + 2) * self._longest  # a question with its answer is below two
        if length < needed:
            raise UserError(
                f"{self._facts} facts and a question may need {needed} tokens, not {length}: "
                "lengthen seq_len or use fewer facts"
            )

    def example(self, rng: random.Random, length: int) -> Example:
        self.check(length)
        while True:  # a story that answers no question is not told
            world = World(rng, self._task != "qa1")
            story = [world.happen() for _ in range(self._facts)]
            if question := world.question(self._task):
                return self._tell(rng, length, [*story, question])

    def lesson(self, rng: random.Random, length: int) -> Example:
        """A story that fills about half the text, with a question after every other fact."""
        world, lines = World(rng, self._task != "qa1"), []
        while self._longest * (len(lines) + 2) < length // 2:
            lines.append(world.happen())
            if rng.random() < 0.5 and (question := world.question(self._task)):
                lines.append(question)
        asks = any(line.answer for line in lines)
        return self._tell(rng, length, lines) if asks else self.example(rng, length)

    def grade(self, written: Sequence[str], right: Sequence[str], question: str) -> list[bool]:
        """BABILong's own rule: of the places, those that the output names before its first full
        stop and the question does not are just the right one."""
        named = lambda text: {place for place in PLACES if place in text.lower()}
        question = question[question.rfind("Where") :]  # without the sentences before it
        return [
            named(w.split(".")[0]) - named(question) == named(r)
            for w, r in zip(written, right, strict=True)
        ]

    def _tell(self, rng: random.Random, length: int, lines: Sequence[Line]) -> Example:
        """The lines at random places between sentences of the text, the last one at its end."""
        parts = [self._tokens_of(line) for line in lines]
        noise = self._noise(rng, length - sum(len(words) for words, _ in parts))
        gaps = [*sorted(rng.choices(range(len(noise) + 1), k=len(lines) - 1)), len(noise)]
        tokens: list[int] = []
        answers, told, evidence = np.zeros(length, np.int32), [], []
        for before, gap, line, (words, of_answer) in zip(
            [0, *gaps], gaps, lines, parts, strict=False
        ):
            tokens += itertools.chain(*noise[before:gap])
            start, stop = len(tokens), len(tokens) + len(words)
            tokens += words
            if line.answer is None:
                told.append((start, stop))
            else:
                evidence.append(told[line.source])
                answers[stop - of_answer : stop] = len(evidence)
        evidence = np.array(evidence, np.int32).reshape(-1, 2)
        return Example(np.array(tokens, np.int32), answers, evidence)

    def _tokens_of(self, line: Line) -> tuple[list[int], int]:
        """A line, and how many tokens at its end are the answer and its full stop."""
        words = self._encode(line.words)
        answer = [] if line.answer is None else self._encode(line.answer + ".")
        return words + answer, len(answer)

    def _encode(self, words: str) -> list[int]:
        return self._tokenizer.encode(" " + words).tolist()

    def _noise(self, rng: random.Random, length: int) -> list[list[int]]:
        """Sentences in a row from a random one on, the last cut so that they fill `length`."""
        start, noise = rng.randrange(len(self._sentences)), []
        for sentence in itertools.chain(self._sentences[start:], itertools.cycle(self._sentences)):
            if length <= 0:
                return noise
            noise.append(sentence[:length])
            length -= len(sentence)


@functools.lru_cache(maxsize=4)  # a run has several tasks over one text
def _sentences(tokenizer: Tokenizer, split: str) -> list[list[int]]:
    sentences = re.split(r"(?<=[.!?])\s+", "\n".join(documents(split)))
    encoded = (tokenizer.encode(" " + sentence).tolist() for sentence in sentences)
    return [sentence for sentence in encoded if len(sentence) >= SHORTEST]
