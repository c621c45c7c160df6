"""Whether a program fits, what fills the memory if not, and what would help most."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hybridjax.aot.bill import bill
from hybridjax.aot.program import Program, local_bytes
from hybridjax.config import Config


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. `parts`: by arithmetic; the rest as the compiler laid it out."""

    parts: Mapping[str, int]
    arguments: int
    outputs: int  # beyond those that are written over arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


def of_compiled(program: Program, compiled) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        program.bytes(),
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What the compiler says of a program that does not fit."""

    needed: float  # bytes on one device; of all it could count before it gave up
    available: float
    largest: tuple[str, ...]  # "4.00G op_name shape"


_SIZE = r"([\d.]+)([KMGT]?)"
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def shortage(message: str) -> Shortage | None:
    """Reads XLA's RESOURCE_EXHAUSTED; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    temporaries = re.search(
        rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message
    )
    found = (used or temporaries).groups() if used or temporaries else ("0", "", "0", "")
    bytes_of = lambda number, unit: float(number) * _UNIT[unit]
    largest = re.findall(
        rf'Size: ({_SIZE})\s*\n(?:\s*Operator: op_name="([^"]*)".*\n)?\s*Shape: (\S+)', message
    )
    lines = tuple(f"{size} {op or 'unnamed'} {shape}" for size, _, _, op, shape in largest)
    return Shortage(bytes_of(*found[:2]), bytes_of(*found[2:]), lines)


def largest_values(program: Program, count: int = 5) -> tuple[str, ...]:
    """The largest arrays of the traced program on one device, before the compiler fuses any."""
    found = {}

    def visit(jaxpr):
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            name = equation.primitive.name
            if name in ("jit", "pjit", "closed_call", "remat", "checkpoint"):
                visit(equation.params["jaxpr"])
                continue
            for variable in equation.outvars:
                aval = variable.aval
                if getattr(aval, "size", 0):
                    size = local_bytes(_as_struct(aval))
                    found[size, name, str(aval.dtype), aval.shape] = None

    visit(program.traced.jaxpr)
    top = sorted(found, key=lambda key: -key[0])[:count]
    return tuple(f"{size / 2**30:.2f}G {op} {dtype}{list(shape)}" for size, op, dtype, shape in top)


def _as_struct(aval) -> jax.ShapeDtypeStruct:
    sharding = getattr(aval, "sharding", None)
    placed = sharding if sharding is not None and not sharding.mesh.empty else None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=placed)


# ---------------------------------------------------------------- what would help


@dataclasses.dataclass(frozen=True)
class Change:
    what: str
    saves: float  # bytes of one device, estimated


def changes(program: Program, config: Config, mesh, needed: float) -> list[Change]:
    """Changes that make a program smaller, by what they are expected to save, the best first.

    What is not parameters, optimizer or state grows with the tokens of a device: it halves when
    they do. Gradients take what the parameters take.
    """
    parts, sizes = program.bytes(), dict(mesh.shape)
    weights = parts["parameters"]
    if "optimizer" in parts:
        weights = 2 * weights + parts["optimizer"] + parts.get("teacher", 0)
        return sorted(_of_training(config, sizes, weights, needed - weights), key=_by_saving)
    found = []
    state = parts["state"]
    kv_heads = max(_options(config, "kv_heads") or _options(config, "heads"), default=1)
    if 2 * sizes["tensor"] <= kv_heads:
        what = f"--config.mesh.tensor={2 * sizes['tensor']}"
        half = (weights + state) / 2
        found.append(Change(f"{what}: half the weights and the heads' state", half))
    what = f"--config.mesh.context={2 * sizes['context']}"
    found.append(Change(f"{what}: half the key/value cache", state / 2))
    rows = program.tokens if program.name == "decode" else 1
    if rows > 1:
        found.append(Change(f"--rows={rows // 2}: half the state", state / 2))
    what = f"--config.mesh.fsdp={2 * sizes['fsdp']}"
    found.append(Change(f"{what}: half the weights", weights / 2))
    return sorted(found, key=_by_saving)


def _of_training(config: Config, sizes, weights: float, activations: float) -> list[Change]:
    rows = config.batch_size // config.accumulate // (sizes["data"] * sizes["fsdp"])
    found = []
    if sizes["data"] > 1:
        what = f"--config.mesh.fsdp={2 * sizes['fsdp']} --config.mesh.data={sizes['data'] // 2}"
        found.append(Change(f"{what}: half the weights, moments and gradients", weights / 2))
    if rows > 1:
        what = f"--config.accumulate={2 * config.accumulate}"
        found.append(Change(f"{what}: half the rows at once", activations / 2))
    tokens = rows * config.seq_len // sizes["context"]
    if config.model.remat != "full":
        what = "--config.model.remat=full: only the stream between blocks is kept"
        found.append(Change(what, min(activations, tokens * _kept(config, sizes["tensor"]))))
    what = f"--config.mesh.context={2 * sizes['context']}"
    found.append(Change(f"{what}: half the tokens of a row on a device", activations / 2.001))
    what = f"--config.mesh.tensor={2 * sizes['tensor']}"
    found.append(Change(f"{what}: half the weights and of what is inside a block", weights / 2.001))
    return found


def _kept(config: Config, tensor: int) -> float:
    """Bytes per token that the remat policy keeps besides the stream between blocks."""
    model = config.model
    width = len(model.layers) * model.width * jnp.dtype(model.dtype).itemsize
    if model.remat == "names":
        return 2 * width
    parameters = bill(model, 128).total("parameters")  # a product keeps a number per output
    products = parameters / model.width * jnp.dtype(model.dtype).itemsize / tensor
    return products if model.remat == "dots" else 2 * products


def _by_saving(change: Change) -> float:
    return -change.saves


def _options(config: Config, name: str) -> list[int]:
    mixers = [m for block in config.model.blocks.values() for m in block.mixers]
    return [m[name] for m in mixers if m.get(name)]
