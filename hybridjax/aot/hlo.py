"""Reads the text of a compiled program: computations, how often each runs, bytes it moves.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, so a model whose
layers are scanned looks as if it had one. Here every computation gets its number of runs.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{\s*$")
# A kernel's attributes may go on for lines, and end in "}, ...": that does not end a computation.
_END = re.compile(r'\}\s*$|\}, execution_thread="')
_CALLED = re.compile(r"(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_NO_TRAFFIC = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "opt-barrier partition-id replica-id iota".split()
)


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True  # TPU layouts name the memory space; S(0) is HBM and is not written

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        size = _BYTES.get(self.dtype, int(digits[0]) / 8 if digits else 0)
        return size * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str  # the text behind the operands
    text: str  # that of the operands, which for a constant is its value
    root: bool

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.name


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def runs(self) -> tuple[dict[str, float], list[str]]:
        """How often each computation runs in one step; loops whose count is not in the text."""
        runs, unknown = defaultdict(float), []

        def visit(name: str, times: float) -> None:
            runs[name] += times
            for instruction in self.computations[name].values():
                inner = times
                if instruction.opcode == "while":
                    trips = self.trip_count(instruction)
                    unknown.extend([instruction.op_name] if trips is None else [])
                    inner *= 1 if trips is None else trips
                if instruction.opcode in ("async-done", "async-update"):
                    continue  # their computation is that of async-start
                for callee in self.called(instruction):
                    visit(callee, inner)

        visit(self.entry, 1.0)
        return dict(runs), unknown

    def called(self, instruction: Instruction) -> list[str]:
        names = [name for _, name in _CALLED.findall(instruction.attributes)]
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names += re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return [name for name in names if name in self.computations]

    def trip_count(self, loop: Instruction) -> int | None:
        """From `known_trip_count`, else the constant that the loop's counter is compared with."""
        known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        root = next(i for i in self.computations[condition[1]].values() if i.root)
        return self._bound(root, self.computations[condition[1]])

    def _bound(self, compare: Instruction, around: Mapping[str, Instruction]) -> int | None:
        if compare.opcode == "fusion":  # the CPU backend wraps the comparison
            inner = self.computations[self.called(compare)[0]]
            parameters = [i for i in inner.values() if i.opcode == "parameter"]
            given = {p.name: around[compare.operands[int(p.text)]] for p in parameters}
            root = next(i for i in inner.values() if i.root)
            return self._bound(root, {**inner, **given})
        operands = [around.get(name) for name in compare.operands]
        constants = [o for o in operands if o is not None and o.opcode == "constant"]
        if compare.opcode != "compare" or len(constants) != 1:
            return None
        inclusive = "direction=LE" in compare.attributes or "direction=GE" in compare.attributes
        return int(constants[0].text) + inclusive

    def hbm_bytes(self) -> float:
        """Bytes read from and written to HBM in one run, each fusion's operands and results once.

        A fusion that only reads a slice of an operand is charged for the slice, and one that
        writes a slice in place for that. What the compiler keeps in on-chip memory is free.
        """
        runs, _ = self.runs()
        fused = {
            name
            for computation in self.computations.values()
            for i in computation.values()
            if i.opcode not in ("while", "conditional", "call")
            for name in self.called(i)
        }
        return sum(
            times * self._traffic(instruction, self.computations[name])
            for name, times in runs.items()
            if name not in fused
            for instruction in self.computations[name].values()
        )

    def _traffic(self, instruction: Instruction, around: Mapping[str, Instruction]) -> float:
        in_hbm = lambda arrays: sum(a.bytes for a in arrays if a.in_hbm)
        if instruction.opcode == "copy-start":  # (destination, source, flag)
            return in_hbm(instruction.outputs[:2])
        if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith(("-done", "-start")):
            return 0.0
        slices, written = self._slices(instruction)
        read = 0.0
        for index, name in enumerate(instruction.operands):
            operand = around.get(name)
            if operand is not None and any(a.in_hbm for a in operand.outputs):
                read += slices.get(index, in_hbm(operand.outputs))
        return read + (in_hbm(instruction.outputs) if written is None else written)

    def _slices(self, instruction: Instruction) -> tuple[dict[int, float], float | None]:
        """Bytes read of operands of which slices are read, by index; bytes written in place."""
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return {0: sum(a.bytes for a in instruction.outputs)}, None
        if instruction.opcode != "fusion":
            return {}, None
        inner = self.computations[self.called(instruction)[0]]
        users = defaultdict(list)
        for i in inner.values():
            for name in i.operands:
                users[name].append(i)
        slices, written = {}, None
        for i in inner.values():
            if i.opcode != "parameter":
                continue
            found = users[i.name]
            if found and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in found):
                slices[int(i.text)] = sum(a.bytes for u in found for a in u.outputs)
            elif len(found) == 1 and _updates(found[0], i):
                update = inner[found[0].operands[1]]
                slices[int(i.text)], written = 0.0, sum(a.bytes for a in update.outputs)
        return slices, written


def _updates(user: Instruction, target: Instruction) -> bool:
    in_place = user.opcode == "dynamic-update-slice" and user.operands[0] == target.name
    return in_place and user.root


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header and "=" not in line.partition("(")[0]:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif _END.match(line):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end + text[end:].index(opcode))
    stop = _closing(text, start)
    inside = text[start + 1 : stop - 1]
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(name, opcode, arrays(text[:end]), operands, text[stop:], inside, root)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays that the text of a (tuple) shape names."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(n) for n in dims.split(",")) if dims else ()
        found.append(Array(dtype, shape, not re.search(r"S\([1-9]\d*\)", layout)))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)
