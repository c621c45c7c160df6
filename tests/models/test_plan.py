"""The planner: from the layer string to the groups that are compiled."""

import functools
import importlib.util
import itertools
import pathlib

import pytest

from hybridjax.config import UserError
from hybridjax.models.plan import Letter, plan

LEGEND = {
    **{letter: Letter() for letter in "LAS"},
    "E": Letter(publishes=("memory",), counted=False),
    "H": Letter(reads=("memory",), publishes=("selection",)),
    "h": Letter(reads=("memory", "selection")),
    "D": Letter(publishes=("indices",)),
    "d": Letter(reads=("indices",)),
    "M": Letter(reads=("memory",), publishes=("memory",)),  # passes on what it refines
}


def groups(layers):
    return [(group.pattern, group.repeats) for group in plan(layers, LEGEND)]


TABLE = {
    "one letter": ("A", [("A", 1)]),
    "one kind": ("LLLL", [("L", 4)]),
    "a pattern": ("LLLA" * 9, [("LLLA", 9)]),
    "a pattern and a rest": ("LLLA" * 3 + "SS", [("LLLA", 3), ("S", 2)]),
    "two runs": ("AAALLLLL", [("A", 3), ("L", 5)]),
    "dense first": ("A" + "LLS" * 4, [("A", 1), ("LLS", 4)]),
    "nothing repeats": ("LAS", [("LAS", 1)]),
    "fewer bodies before fewer groups": ("LLLLA", [("L", 4), ("A", 1)]),
    "index sharing": ("Dddd" * 3, [("Dddd", 3)]),
    "chunk memory": ("SSSSE" + "HSSS" * 2, [("S", 4), ("E", 1), ("HSSS", 2)]),
    "chunk memory, shared selection": ("SE" + "HhSh" * 3, [("SE", 1), ("HhSh", 3)]),
    "read by a later group": ("DdDdDdd", [("Dd", 2), ("D", 1), ("d", 2)]),
    "read above its repeats": ("DLDLd", [("DLDLd", 1)]),
    "read by the next repeat": ("EMMMH", [("EMMMH", 1)]),
}


@pytest.mark.parametrize("layers, expected", TABLE.values(), ids=TABLE.keys())
def test_groups(layers, expected):
    found = plan(layers, LEGEND)
    assert "".join(g.pattern * g.repeats for g in found) == layers
    starts = [0, *itertools.accumulate(len(g.pattern) * g.repeats for g in found)]
    assert [g.start for g in found] == starts[:-1]
    assert [g.stop for g in found] == starts[1:]
    assert [(g.pattern, g.repeats) for g in found] == expected


FAULTS = {
    "no layers": ("", "config.model.layers is empty"),
    "unknown letter": ("LAX", "layer 2 of 'LAX' is 'X', which is not in the legend"),
    "no publisher": ("LHA", "layer 1 ('H') of 'LHA' reads 'memory'"),
    "publisher above": ("SHE", "layer 1 ('H') of 'SHE' reads 'memory'"),
    "one of two": ("EhH", "layer 1 ('h') of 'EhH' reads 'selection'"),
    "no chain without a start": ("MH", "layer 0 ('M') of 'MH' reads 'memory'"),
}


@pytest.mark.parametrize("layers, message", FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_letter_and_position(layers, message):
    with pytest.raises(UserError) as error:
        plan(layers, LEGEND)
    assert message in str(error.value) and "\n" not in str(error.value)


CHUNKS = {
    "E": Letter(publishes=("memory",), counted=False, align=16),
    "e": Letter(publishes=("memory",), counted=False, align=24),
    "F": Letter(publishes=("memory",), counted=False, align=8),
    "H": Letter(reads=("memory",), window=16),
    "h": Letter(reads=("memory",), window=12),
    "A": Letter(reads=("memory",)),
    "S": Letter(window=4),
}


def test_windows_hold_the_unfinished_chunk_and_chunks_divide_the_largest():
    for layers in ("SEHA", "SFhEHA", "SeA", "FAeA"):
        assert plan(layers, CHUNKS)
    for layers, message in {
        "SEHh": "layer 3 ('h') of 'SEHh' has a window of 12 tokens and reads chunks of 16 once",
        "EAeA": "'E' of 'EAeA' has chunks of 16 tokens and documents start at multiples of 24",
    }.items():
        with pytest.raises(UserError) as error:
            plan(layers, CHUNKS)
        assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the fewest bodies


def fewest_bodies(layers):
    """By trying every cut; for stacks that share nothing."""

    @functools.cache
    def best(rest):
        if not rest:
            return 0
        found = []
        for width in range(1, len(rest) + 1):
            for repeats in range(1, len(rest) // width + 1):
                if rest.startswith(rest[:width] * repeats):
                    found.append(width + best(rest[width * repeats :]))
        return min(found)

    return best(layers)


def bodies(layers):
    return sum(len(group.pattern) for group in plan(layers, LEGEND))


@pytest.mark.parametrize("length", range(1, 11))
def test_no_cut_has_fewer_bodies(length):
    for layers in map("".join, itertools.product("LA", repeat=length)):
        assert bodies(layers) == fewest_bodies(layers), layers


def test_no_cut_has_fewer_bodies_with_shared_values():
    """Every split into groups that a scan can run, tried one by one."""
    for layers in map("".join, itertools.product("DdL", repeat=6)):
        if layers.find("d") != -1 and "D" not in layers[: layers.find("d")]:
            continue
        assert bodies(layers) == min(map(sum, _legal_cuts(layers, 0))), layers


def _legal_cuts(layers, start):
    """The widths of the groups of every legal cut of layers[start:]."""
    if start == len(layers):
        yield []
    for width in range(1, len(layers) - start + 1):
        pattern = layers[start : start + width]
        for repeats in range(1, (len(layers) - start) // width + 1):
            stop = start + width * repeats
            if layers[start:stop] == pattern * repeats and (
                repeats == 1 or _scannable(pattern, layers[stop:])
            ):
                for rest in _legal_cuts(layers, stop):
                    yield [width, *rest]


def _scannable(pattern, after):
    """Whether all that reads a repeat's `indices` is in the same repeat."""
    if "D" not in pattern:
        return True
    read_below = "d" in pattern[: pattern.index("D")]
    read_above = "d" in after[: after.find("D") if "D" in after else None]
    return not read_below and not read_above


def preset(name):
    path = pathlib.Path(__file__).parents[2] / "configs" / "hypenet.py"
    spec = importlib.util.spec_from_file_location("hypenet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(name).model.layers


@pytest.mark.parametrize("name, depth", [("2b", 28), ("5b", 36), ("9b", 36), ("500m", 28)])
def test_published_stacks_have_the_fewest_bodies(name, depth):
    layers = preset(name)
    assert len(layers) == depth
    assert bodies(layers) == fewest_bodies(layers) < depth
