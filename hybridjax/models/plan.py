"""From the layer string to what is compiled: groups of a pattern repeated.

`"LLLALLLA"` is one group, the pattern LLLA twice, and compiles four bodies. An irregular string is
cut into the groups with the fewest bodies in all. A value that one layer publishes and another
reads constrains the cut, because a scan does not carry it: inside a repeat, only that repeat's own
publishers are visible, and a value read outside comes from a group that is not repeated.
"""

import dataclasses
from collections.abc import Mapping

from hybridjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Letter:
    """What the planner needs to know of a block."""

    publishes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    counted: bool = True  # False: adds nothing to the stream, so it is not a layer
    align: int = 1  # documents start at multiples of so many tokens
    window: int | None = None  # tokens that it sees for itself, the own included; None: no bound


@dataclasses.dataclass(frozen=True)
class Group:
    pattern: str
    repeats: int
    start: int  # index of its first letter in the string

    @property
    def stop(self) -> int:
        return self.start + len(self.pattern) * self.repeats


def plan(layers: str, legend: Mapping[str, Letter]) -> tuple[Group, ...]:
    """The groups, in order, whose patterns have the fewest letters in all; then fewest groups.

    Raises:
      UserError: an empty string, a letter that the legend lacks, a reader without a publisher or
        with a smaller window than the publisher's chunks, chunks that do not divide the largest.
    """
    links = _links(layers, legend)
    _check_chunks(layers, legend)
    best: list[tuple[int, int, tuple[Group, ...]]] = [(0, 0, ())]
    for stop in range(1, len(layers) + 1):
        options = []
        for start in range(stop):
            for pattern in _periods(layers[start:stop]):
                group = Group(layers[start : start + pattern], (stop - start) // pattern, start)
                if group.repeats == 1 or all(_visible(link, group) for link in links):
                    bodies, count, groups = best[start]
                    options.append((bodies + pattern, count + 1, (*groups, group)))
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]


def _periods(piece: str) -> list[int]:
    """Lengths of the patterns that give the piece when repeated, itself included."""
    n = len(piece)
    return [p for p in range(1, n + 1) if n % p == 0 and piece[:p] * (n // p) == piece]


def _links(layers: str, legend: Mapping[str, Letter]) -> list[tuple[int, int]]:
    """(publisher, reader) indices: each reader takes the nearest publisher below it."""
    if not layers:
        raise UserError("config.model.layers is empty: give one letter per layer")
    links, nearest = [], {}
    for index, letter in enumerate(layers):
        if letter not in legend:
            known = ", ".join(sorted(legend))
            raise UserError(
                f"layer {index} of {layers!r} is {letter!r}, which is not in the legend ({known})"
            )
        for name in legend[letter].reads:
            if name not in nearest:
                raise UserError(
                    f"layer {index} ({letter!r}) of {layers!r} reads {name!r}, which no layer "
                    f"below it publishes: put a publisher before it"
                )
            chunk, window = legend[layers[nearest[name]]].align, legend[letter].window
            if window is not None and window < chunk:
                raise UserError(
                    f"layer {index} ({letter!r}) of {layers!r} has a window of {window} tokens and "
                    f"reads chunks of {chunk} once they are whole: give it a window of {chunk} or "
                    "more, to see the unfinished one"
                )
            links.append((nearest[name], index))
        nearest |= dict.fromkeys(legend[letter].publishes, index)
    return links


def _check_chunks(layers: str, legend: Mapping[str, Letter]) -> None:
    aligns = {letter: legend[letter].align for letter in layers}
    largest = max(aligns.values())
    for letter, align in aligns.items():
        if largest % align:
            raise UserError(
                f"{letter!r} of {layers!r} has chunks of {align} tokens and documents start at "
                f"multiples of {largest}: choose chunk sizes that divide the largest"
            )


def _visible(link: tuple[int, int], group: Group) -> bool:
    """Whether the reader sees the publisher when `group` is scanned."""
    repeat = lambda index: (index - group.start) // len(group.pattern)
    inside = lambda index: group.start <= index < group.stop
    publisher, reader = link
    if inside(publisher):
        return inside(reader) and repeat(publisher) == repeat(reader)
    return True  # published outside: closed over by every repeat
