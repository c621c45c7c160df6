"""FLOPs of a traced program's matrix products on one device, recomputation included.

Explicit meshes put each array's place into its type, so the part that one device multiplies is
known before anything is compiled. Scans count as often as they run, which XLA's `cost_analysis`
does not do. What is hidden in a loop whose length depends on data (attention that skips what no
query sees), or in a kernel that does the same, is not counted but named, so that the caller adds it
from a formula. Products that the partitioner places by itself (`auto_axes`: Muon's) count as if
every device did all of them.
"""

import dataclasses
import math
from collections.abc import Iterator

_SKIPS_BY_DATA = ("splash",)  # kernels whose grid is larger than what they compute


@dataclasses.dataclass(frozen=True)
class Flops:
    """`counted` on one device; `hidden`: names of loops and kernels that were left out."""

    counted: float
    hidden: tuple[str, ...] = ()

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.counted + other.counted, self.hidden + other.hidden)

    def times(self, count: float) -> "Flops":
        return Flops(self.counted * count, self.hidden)


def count(jaxpr) -> Flops:
    """The FLOPs of `traced.jaxpr`; 2 per multiplication and addition of a product."""
    total = Flops(0.0)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total += _equation(equation)
    return total


def _equation(equation) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_product(equation))
    if name == "scan":
        return count(params["jaxpr"]).times(params["length"])
    if name == "while":
        inner = count(params["body_jaxpr"])
        return Flops(0.0, ("while",) if inner.counted or inner.hidden else ())
    if name == "cond":
        return max(map(count, params["branches"]), key=lambda f: f.counted)
    if name == "pallas_call":
        return _kernel(params)
    total = Flops(0.0)
    for inner in _inner(params):
        total += count(inner)
    return total


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = _local_shape(equation.invars[0].aval)
    outputs = math.prod(_local_shape(equation.outvars[0].aval))
    return 2.0 * outputs * math.prod(lhs[axis] for axis in contracted)


def _local_shape(aval) -> list[int]:
    """The part on one device; inside a shard_map shapes are those of parts already."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return list(aval.shape)
    ways = [_ways(entry, sharding.mesh) for entry in sharding.spec]
    ways += [1] * (len(aval.shape) - len(ways))
    return [size // n for size, n in zip(aval.shape, ways, strict=True)]


def _ways(entry, mesh) -> int:
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names if name in mesh.shape)


def _kernel(params) -> Flops:
    name = getattr(params.get("name_and_src_info"), "name", "") or str(params.get("name"))
    if any(part in name for part in _SKIPS_BY_DATA):
        return Flops(0.0, (name,))
    grid = params["grid_mapping"].grid
    if not all(isinstance(n, int) for n in grid):
        return Flops(0.0, (name,))
    return count(params["jaxpr"]).times(math.prod(grid))


def _inner(params) -> Iterator:
    """The jaxprs among an equation's parameters: of a call, a checkpoint, a custom derivative."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item
