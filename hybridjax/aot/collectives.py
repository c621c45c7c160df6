"""The collectives of a compiled program: which mesh axes they cross, how often, how many bytes."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from hybridjax.aot.hlo import Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one program, summed.

    Attributes:
      axes: the mesh axes along which the devices of a group differ.
      count: per step.
      sent: bytes that one device sends per step, by the bandwidth-optimal algorithm on a ring of n:
        all-reduce 2 (n - 1) / n of the array, all-gather, reduce-scatter and all-to-all (n - 1) / n
        of the larger one, collective-permute all of it.
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    sent: float


def collectives(module: Module, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives of a partitioned program, by kind and axes, the largest first."""
    runs, _ = module.runs()
    position = {}  # of a partition: its coordinates on the mesh
    for coordinates in np.ndindex(*mesh.devices.shape):
        position[len(position)] = coordinates

    totals = defaultdict(lambda: np.zeros(2))  # count, bytes sent
    for computation, instruction, scatters in _occurrences(module, runs):
        kind = instruction.opcode.removesuffix("-start")
        groups = _groups(instruction, mesh.size)
        size = _group_size(groups, kind)
        if size == 1:
            continue
        sent = _sent(kind, instruction, size, scatters)
        kind = "reduce-scatter" if scatters else kind
        totals[kind, _axes(groups, position, mesh)] += runs[computation] * np.array([1.0, sent])
    slices = {getattr(device, "slice_index", None) for device in mesh.devices.flat}
    if len(slices) > 1:
        for computation, kind, instruction in _between_slices(module, runs):
            sent = _sent(kind, instruction, len(slices), False)
            totals[kind, _slice_axes(mesh)] += runs[computation] * np.array([1.0, sent])
    found = [Collective(*key, *map(float, total)) for key, total in totals.items()]
    return sorted(found, key=lambda c: -c.sent)


def by_axes(found: Sequence[Collective]) -> dict[tuple[str, ...], float]:
    """Bytes that a device sends along each set of axes."""
    totals = defaultdict(float)
    for collective in found:
        totals[collective.axes] += collective.sent
    return dict(totals)


def _occurrences(module: Module, runs) -> list[tuple[str, Instruction, bool]]:
    """(computation, collective, whether it is an all-reduce of which only a slice is kept).

    The TPU compiler spreads an asynchronous collective over several fusions, which all name it and
    its channel: only the one that starts it counts.
    """
    starts, others = {}, []
    for name in runs:
        computation = module.computations[name]
        called = {t for i in computation.values() for t in [_target(i)] if t}
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") not in KINDS:
                continue
            item = (name, instruction, "all-reduce-scatter" in name)
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if "AsyncCollectiveStart" in called and channel:
                starts[channel[1]] = item
            else:
                others.append((channel[1] if channel else None, item))
    return [*starts.values(), *(item for channel, item in others if channel not in starts)]


def _between_slices(module: Module, runs) -> Iterator[tuple[str, str, Instruction]]:
    """(computation, kind, send): what hosts exchange between slices for their devices."""
    for name in runs:
        for instruction in module.computations[name].values():
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
            if instruction.opcode == "send" and kind:
                yield name, kind[1].lower().replace("_", "-"), instruction


def _slice_axes(mesh) -> tuple[str, ...]:
    """The mesh axes that lead from one slice to another."""
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    crossing = [np.any(slices != slices.take([0], axis)) for axis in range(slices.ndim)]
    return tuple(name for name, c in zip(mesh.axis_names, crossing, strict=True) if c)


def _target(instruction: Instruction) -> str | None:
    found = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
    return found[1] if found else None


def _sent(kind: str, instruction: Instruction, n: int, scatters: bool) -> float:
    sizes = [a.bytes for a in instruction.outputs]
    if instruction.opcode == "send":
        sizes = sizes[:1]  # (array, flags)
    if instruction.opcode == "all-gather-start":
        sizes = sizes[len(sizes) // 2 :]  # (operands, results)
    if kind == "collective-permute":  # where it only starts: (operand, result, flags)
        return sizes[1] if instruction.opcode.endswith("-start") else sum(sizes)
    size, part = sum(sizes), (n - 1) / n
    if kind == "reduce-scatter":
        return part * n * size  # the result is one n-th of what is reduced
    return part * size * (2 if kind == "all-reduce" and not scatters else 1)


# ---------------------------------------------------------------- who talks to whom


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Partition numbers `[groups, members]`; for a permute the pairs (source, target)."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", text)
    if pairs:
        return _listed(pairs[1])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if listed:
        return _listed(listed[1]) if listed[1] else np.arange(devices)[None]
    named = re.search(r"replica_groups=mesh\['?([^\]]*)\](.*?)\{([^}]*)\}", text)
    if named:
        return _mesh_groups(*named.groups())
    iota = re.search(r"replica_groups=(\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?)", text)
    shape, _, source = iota[1].partition("<=")
    return _iota(source).reshape(_integers(shape))


def _listed(text: str) -> np.ndarray:
    return np.array([_integers(group) for group in re.findall(r"\{([\d,]*)\}", text)])


def _mesh_groups(sizes: str, rest: str, chosen: str) -> np.ndarray:
    """`mesh['x'=2,'y'=4], device_ids=([8]) {'x'}`: the groups along the chosen axes of a mesh.

    An axis may be cut, `'y':(1)2`: the part of size 2 below a part of size 1.
    """
    shape = re.findall(r"'?([\w.]+)'?=(\d+)", sizes)
    order = re.search(r"device_ids=\(?(\[[\d,]*\](?:T\([\d,]*\))?)", rest)
    ids = _iota(order[1]) if order else np.arange(math.prod(int(n) for _, n in shape))
    parts = re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", chosen)
    cuts = {name: (int(before or 1), int(part or 0)) for name, before, part in parts}
    dimensions, taken = [], []  # the mesh with cut axes apart
    for name, size in ((name, int(n)) for name, n in shape):
        before, part = cuts.get(name, (size, 1))
        part = part or size
        dimensions += [before, part, size // before // part]
        taken += [False, name in cuts, False]
    along = [i for i, t in enumerate(taken) if t]
    apart = [i for i, t in enumerate(taken) if not t]
    members = math.prod(dimensions[i] for i in along)
    return ids.reshape(dimensions).transpose(apart + along).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers 0.. in that shape, transposed, flat."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return (numbers.transpose(_integers(order)) if order else numbers).reshape(-1)


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _group_size(groups: np.ndarray, kind: str) -> int:
    if kind == "collective-permute":
        return 2 if np.any(groups[:, 0] != groups[:, 1]) else 1
    return groups.shape[1]


def _axes(groups: np.ndarray, position, mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    places = np.array([[position[int(member)] for member in group] for group in groups])
    differ = np.any(places != places[:, :1], axis=(0, 1))
    return tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)
