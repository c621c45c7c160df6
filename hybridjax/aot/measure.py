"""One program compiled for one topology: its memory, its collectives, its bound."""

import dataclasses
import time
from typing import Any

import jax

from hybridjax.aot.bill import bill
from hybridjax.aot.bound import Bound, bound
from hybridjax.aot.collectives import Collective, by_axes, collectives
from hybridjax.aot.flops import count
from hybridjax.aot.hlo import parse
from hybridjax.aot.memory import Change, Memory, changes, largest_values, of_compiled, shortage
from hybridjax.aot.program import Program, trace
from hybridjax.aot.topology import Target
from hybridjax.config import Config, MeshConfig
from hybridjax.sharding import ways

# Products in attention relative to its forward pass: q kᵀ and p v once, twice more in the
# backward pass, where TPU kernels make q kᵀ and dp again for dq and for dk, dv: 7 for 2.
_BACKWARD = 3.5


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile: the train step, or reading or writing with a state of `context` tokens."""

    program: str = "train"
    context: int = 0
    rows: int = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of one device and one step unless they say otherwise.

    Attributes:
      memory: None if the program does not fit; then `needed` is what the compiler counted.
      flops: of matrix products, recomputation included; `hidden`: the part from a formula.
      useful: FLOPs of the model itself (training: three forward passes).
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    job: Job
    tokens: int
    parts: dict[str, int]
    bodies: int
    trace_seconds: float
    compile_seconds: float
    fits: bool
    needed: float
    available: float | None
    flops: float
    hidden: float
    useful: float
    memory: Memory | None = None
    hbm_bytes: float | None = None
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    bound: Bound | None = None
    largest: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    def json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if self.bound is not None:
            extra = ("seconds", "limit", "mfu", "mfu_serial")
            values["bound"] |= {name: getattr(self.bound, name) for name in extra}
        return values


def measure(config: Config, target: Target, job: Job, mesh: MeshConfig | None = None) -> Result:
    """Compiles a program for devices that need not exist.

    Raises:
      UserError: sizes that do not fit the mesh.
    """
    devices = target.mesh(mesh or config.mesh)
    start = time.perf_counter()
    program = trace(config, devices, job.program, rows=job.rows, context=job.context)
    lowered = program.traced.lower()
    middle = time.perf_counter()
    failure, compiled = None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        failure = shortage(str(error))
        if failure is None:
            raise
    end = time.perf_counter()

    counted = count(program.traced.jaxpr)
    hidden = _hidden(config, job, devices, program) if counted.hidden else 0.0
    per_chip = target.devices_per_chip
    result = Result(
        topology=target.name,
        slices=target.slices,
        chips=devices.size // per_chip,
        mesh=dict(devices.shape),
        job=job,
        tokens=program.tokens,
        parts=program.bytes(),
        bodies=program.bodies,
        trace_seconds=middle - start,
        compile_seconds=end - middle,
        fits=failure is None,
        needed=0.0,
        available=None if target.chip is None else target.chip.hbm / per_chip,
        flops=counted.counted + hidden,
        hidden=hidden,
        useful=_useful(config, job) * program.tokens / devices.size,
    )
    if failure is not None:
        needed = max(failure.needed, sum(result.parts.values()))
        return dataclasses.replace(
            result,
            needed=needed,
            available=failure.available,
            largest=failure.largest or largest_values(program),
            changes=tuple(changes(program, config, devices, needed)),
        )
    return _of_compiled(result, config, target, devices, program, compiled)


def _of_compiled(result, config, target: Target, devices, program: Program, compiled) -> Result:
    module = parse(compiled.as_text())
    found = collectives(module, devices)
    memory, hbm_bytes = of_compiled(program, compiled), module.hbm_bytes()
    fits = result.available is None or memory.total <= result.available
    result = dataclasses.replace(
        result,
        memory=memory,
        needed=memory.total,
        fits=fits,
        hbm_bytes=hbm_bytes,
        collectives=tuple(found),
        unknown_loops=tuple(module.runs()[1]),
    )
    if not fits:
        advice = tuple(changes(program, config, devices, memory.total))
        return dataclasses.replace(result, largest=largest_values(program), changes=advice)
    if target.chip is None:
        return result
    limits = bound(
        target.chip, devices,
        flops=result.flops, useful=result.useful, hbm_bytes=hbm_bytes, sent=by_axes(found),
    )  # fmt: skip
    return dataclasses.replace(result, bound=limits)


def _useful(config: Config, job: Job) -> float:
    """FLOPs per token of the model itself, over all devices."""
    if job.program == "train":
        return 3 * bill(config.model, config.seq_len).total("flops")
    return bill(config.model, job.context).total("decode_flops")


def _hidden(config: Config, job: Job, mesh, program: Program) -> float:
    """FLOPs on one device that no trace shows; a query of `prefill` reads a full cache."""
    with jax.set_mesh(mesh):
        devices = ways("batch") * ways("length") * ways("heads")
    if job.program == "train":
        forward = bill(config.model, config.seq_len).total("hidden_flops")
        passes = 1 + (config.model.remat != "none") + _BACKWARD
    else:
        forward, passes = 2 * bill(config.model, job.context).total("hidden_flops"), 1
    return passes * forward * program.tokens / devices
