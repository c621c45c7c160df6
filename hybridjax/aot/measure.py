"""One program compiled for one topology: its memory, its collectives, its bound."""

import dataclasses
import time
from typing import Any

import jax

from hybridjax.aot import conversion
from hybridjax.aot.bill import bill
from hybridjax.aot.bound import Bound, bound
from hybridjax.aot.collectives import Collective, by_axes, collectives
from hybridjax.aot.flops import count
from hybridjax.aot.hlo import parse
from hybridjax.aot.memory import Change, Memory, changes, largest_values, of_compiled, shortage
from hybridjax.aot.program import ON_HOST, Program, trace
from hybridjax.aot.topology import Target
from hybridjax.config import Config, MeshConfig, ModelConfig
from hybridjax.halo.config import HaloConfig
from hybridjax.sharding import ways

# Products in attention relative to its forward pass: q kᵀ and p v once, twice more in the
# backward pass, where TPU kernels make q kᵀ and dp again for dq and for dk, dv: 7 for 2.
_BACKWARD = 3.5


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile: the train step, reading or writing with a state of `context` tokens, whose
    memory of chunks is on the device or on the host, or an update of a stage of a conversion."""

    program: str = "train"
    context: int = 0
    rows: int = 1
    chunks: str = "device"


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of one device and one step unless they say otherwise.

    Attributes:
      memory: None if the program does not fit; then `needed` is what the compiler counted.
      flops: of matrix products, recomputation included; `hidden`: the part from a formula.
      useful: FLOPs of the models themselves (what is trained: three forward passes).
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

    @property
    def on_device(self) -> int:
        """Bytes of the parts that are in the device's memory."""
        return sum(size for name, size in self.parts.items() if name != ON_HOST)

    def json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if self.bound is not None:
            extra = ("seconds", "limit", "mfu", "mfu_serial")
            values["bound"] |= {name: getattr(self.bound, name) for name in extra}
        return values


def measure(
    config: Config,
    target: Target,
    job: Job,
    mesh: MeshConfig | None = None,
    halo: HaloConfig | None = None,
) -> Result:
    """Compiles a program for devices that need not exist.

    Args:
      halo: the conversion of which the program is a stage; `config` is the stage's run.

    Raises:
      UserError: sizes that do not fit the mesh.
    """
    devices = target.mesh(mesh or config.mesh)
    start = time.perf_counter()
    if halo is None:
        program = trace(
            config, devices, job.program, rows=job.rows, context=job.context,
            chunks_on_host=job.chunks == "host",
        )  # fmt: skip
    else:
        program = conversion.trace(halo, devices, job.program)
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

    counted, models = count(program.traced.jaxpr), _models(config, job, halo)
    hidden = _hidden(config, job, models, devices, program) if counted.hidden else 0.0
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
        useful=_useful(config, job, models) * program.tokens / devices.size,
    )
    if job.program == "align":  # of the mixers nothing is made twice
        result = dataclasses.replace(result, useful=result.flops)
    if failure is not None:
        needed = max(failure.needed, result.on_device)
        return dataclasses.replace(
            result,
            needed=needed,
            available=failure.available,
            largest=failure.largest or largest_values(program),
            changes=_advice(program, config, devices, needed),
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
        advice = _advice(program, config, devices, memory.total)
        return dataclasses.replace(result, largest=largest_values(program), changes=advice)
    if target.chip is None:
        return result
    limits = bound(
        target.chip, devices,
        flops=result.flops, useful=result.useful, hbm_bytes=hbm_bytes, sent=by_axes(found),
    )  # fmt: skip
    return dataclasses.replace(result, bound=limits)


def _advice(program: Program, config: Config, devices, needed: float) -> tuple[Change, ...]:
    found = changes(program, config, devices, needed)
    if program.name not in conversion.STAGES:
        return tuple(found)
    words = lambda what: conversion.in_its_words(what, program.name)
    return tuple(dataclasses.replace(change, what=words(change.what)) for change in found)


def _models(config: Config, job: Job, halo: HaloConfig | None) -> list[tuple[ModelConfig, bool]]:
    """The models whose whole rows are run, and whether backward too."""
    if halo is not None:
        return conversion.forward_passes(halo, job.program)
    return [(config.model, True)] if job.program == "train" else []


def _useful(config: Config, job: Job, models) -> float:
    """FLOPs per token of the model itself, over all devices."""
    if not models:
        return bill(config.model, job.context).total("decode_flops")
    flops = lambda model: bill(model, config.seq_len).total("flops")
    return sum((3 if backward else 1) * flops(model) for model, backward in models)


def _hidden(config: Config, job: Job, models, mesh, program: Program) -> float:
    """FLOPs on one device that no trace shows; a query of `prefill` reads a full cache."""
    with jax.set_mesh(mesh):
        devices = ways("batch") * ways("length") * ways("heads")
    flops = 0.0 if models else 2 * bill(config.model, job.context).total("hidden_flops")
    for model, backward in models:
        again = (model.remat != "none") + _BACKWARD
        forward = bill(model, config.seq_len).total("hidden_flops")
        flops += (1 + again * backward) * forward
    return flops * program.tokens / devices
