"""Looks for the best mesh: all of them by arithmetic, the most promising by compiling them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from hybridjax.aot.bill import Bill, bill
from hybridjax.aot.hardware import chip_of, lies_on, sides
from hybridjax.aot.measure import Job, Result, measure
from hybridjax.aot.topology import Target
from hybridjax.config import Config, MeshConfig, UserError
from hybridjax.loss import SLICE
from hybridjax.sharding import MESH_AXES

_ADAM = 8  # bytes of both moments per parameter, f32


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mesh by arithmetic: bytes and seconds of one device, the seconds as if all at peak."""

    mesh: MeshConfig
    memory: float
    seconds: float

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self.mesh, axis) for axis in MESH_AXES}


def sweep(
    config: Config, target: Target, job: Job, limit: int, say: Callable[[str], None]
) -> list[Result]:
    """Compiles the `limit` meshes that look best; those that fit come first, the fastest first.

    Raises:
      UserError: no mesh divides the devices and the model, or none could fit.
    """
    found = estimates(config, target, job)
    chosen = promising(found, target)[:limit]
    say(f"{len(found)} meshes divide {len(target.devices)} devices; compiling {len(chosen)}")
    results = []
    for estimate in chosen:
        result = measure(config, target, job, estimate.mesh)
        results.append(result)
        say(_line(result, estimate))
    speed = lambda r: r.bound.seconds if r.bound else sum(c.sent for c in r.collectives)
    results.sort(key=lambda r: (not r.fits, speed(r)))
    if results[0].fits:
        best = " ".join(f"--config.mesh.{axis}={n}" for axis, n in results[0].mesh.items())
        say(f"best: {best}")
    return results


def on_paper(topology: str) -> Target:
    """A topology whose devices nobody asked for: enough to divide them."""
    return Target(topology, chip_of(topology), (None,) * math.prod(sides(topology)), 1)


def promising(found: list[Estimate], target: Target) -> list[Estimate]:
    """Those whose parameters and activations could fit, the fastest first."""
    room = math.inf if target.chip is None else target.chip.hbm / target.devices_per_chip
    fitting = [e for e in found if e.memory < room]
    if not fitting:
        least = min(found, key=lambda e: e.memory)
        raise UserError(
            f"no mesh of {target.name} fits: the least is {least.memory / 2**30:.1f} GiB of "
            f"{room / 2**30:.1f} GiB per device, with {least.sizes}: take more chips, "
            "accumulate more, or set remat to full"
        )
    return sorted(fitting, key=lambda e: (e.seconds, e.memory))


def estimates(config: Config, target: Target, job: Job) -> list[Estimate]:
    """Every mesh over data, fsdp, tensor and context that divides the devices and the model."""
    length = config.seq_len if job.program == "train" else job.context
    costs = bill(config.model, length)
    found = [_estimate(config, target, job, costs, mesh) for mesh in _meshes(config, target, job)]
    if not found:
        raise UserError(
            f"no mesh divides the {len(target.devices)} devices of {target.name} and the model: "
            f"batch_size / accumulate is {config.batch_size // config.accumulate}, rows of {length}"
        )
    return found


def _meshes(config: Config, target: Target, job: Job) -> Iterator[MeshConfig]:
    devices, train = len(target.devices), job.program == "train"
    rows = config.batch_size // config.accumulate if train else job.rows
    length = config.seq_len if train else job.context
    mixers = [m for b in config.model.blocks.values() for m in b.mixers]
    heads = math.gcd(*(m["heads"] for m in mixers if "heads" in m)) or 1
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp, tensor, context in itertools.product(divisors, repeat=3):
        data, rest = divmod(devices, fsdp * tensor * context)
        if rest or data == 0 or heads % tensor or length % (context * 128):
            continue
        if not lies_on((data, fsdp, tensor, context), target.name):
            continue
        # A decoding step of fewer rows than devices is replicated over data and fsdp.
        if (train and rows % (data * fsdp)) or data % target.slices:
            continue
        if not train and data * fsdp > rows and fsdp > 1:
            continue  # gathering weights for every token: tensor or context serve better
        yield MeshConfig(data, fsdp, tensor, context)


def _estimate(config: Config, target: Target, job: Job, costs: Bill, mesh: MeshConfig) -> Estimate:
    if job.program == "train":
        memory, seconds = _training(config, target, costs, mesh)
    else:
        memory, seconds = _decoding(config, target, costs, mesh, job)
    return Estimate(mesh, memory, seconds)


def _training(config: Config, target: Target, costs: Bill, mesh: MeshConfig) -> tuple[float, float]:
    model = config.model
    size = jnp.dtype(model.dtype).itemsize
    tokens = tokens_at_once(config, mesh)
    local = costs.total("parameters") / (mesh.fsdp * mesh.tensor)
    memory = local * (4 + _ADAM + 4) + sum(activations(config, costs, mesh).values())

    passes = 3 + (model.remat != "none")
    flops = passes * costs.total("flops") * tokens * config.accumulate / mesh.tensor
    weights = costs.total("gathered_bytes") / mesh.tensor
    sent = {
        "fsdp": _part(mesh.fsdp) * config.accumulate * weights * (passes - 1 + 4 / size),
        "tensor": 2 * _part(mesh.tensor) * costs.total("reduced_bytes") * tokens
        * config.accumulate * (passes - 1),
        "data": 2 * _part(mesh.data) * local * 4,
        "context": _ring(costs, mesh, tokens) * config.accumulate * passes,
    }  # fmt: skip
    return memory, _seconds(target, flops, 0.0, sent)


def tokens_at_once(config: Config, mesh: MeshConfig) -> int:
    """Of one device, in one microbatch."""
    rows = config.batch_size // config.accumulate // (mesh.data * mesh.fsdp)
    return rows * config.seq_len // mesh.context


def activations(config: Config, costs: Bill, mesh: MeshConfig) -> dict[str, float]:
    """Bytes of one device besides parameters, moments and gradients."""
    model, tokens = config.model, tokens_at_once(config, mesh)
    size = jnp.dtype(model.dtype).itemsize
    kept = {"none": 24, "dots": 12, "names": 3, "full": 1}[model.remat]
    hidden = max(b.mlp["hidden"] for b in model.blocks.values() if b.mlp is not None)
    return {
        "kept for the backward pass": len(model.layers) * tokens * model.width * size * kept,
        "inside a block": tokens * (8 * model.width + 6 * hidden / mesh.tensor) * size,
        "gathered weights": 2 * max(i.gathered_bytes for i, _ in costs.items) / mesh.tensor,
        "logits": 3 * 4 * SLICE,
    }


def _decoding(
    config: Config, target: Target, costs: Bill, mesh: MeshConfig, job: Job
) -> tuple[float, float]:
    ways = mesh.data * mesh.fsdp
    rows = job.rows / ways if job.rows % ways == 0 else job.rows  # replicated
    mixers = [m for block in config.model.blocks.values() for m in block.mixers]
    heads = [m.get("kv_heads") or m.get("heads", 1) for m in mixers]
    repeats = max(math.lcm(n, mesh.tensor) // n for n in heads)  # of K/V heads
    state = rows * costs.state_bytes(costs.length) * repeats / (mesh.tensor * mesh.context)
    weights = costs.total("weight_bytes") / mesh.tensor
    flops = rows * costs.total("decode_flops") / (mesh.tensor * mesh.context)
    sent = {
        "fsdp": _part(mesh.fsdp) * costs.total("gathered_bytes") / mesh.tensor,
        "tensor": 2 * _part(mesh.tensor) * costs.total("reduced_bytes") * rows,
    }
    memory = weights / mesh.fsdp + 2 * state
    return memory, _seconds(target, flops, weights + state, sent)


def _ring(costs: Bill, mesh: MeshConfig, tokens: int) -> float:
    """Bytes of keys and values that pass a device while a ring of devices exchanges them."""
    return (mesh.context - 1) * tokens * costs.total("state_per_token") / mesh.tensor


def _seconds(target: Target, flops: float, hbm_bytes: float, sent: dict[str, float]) -> float:
    """As if each axis had one dimension of the torus, and nothing else waited for it."""
    chip = target.chip
    if chip is None:
        return sum(sent.values())
    times = {axis: n / (2 * chip.link_bandwidth / chip.devices) for axis, n in sent.items()}
    if target.slices > 1:
        times["data"] = sent.get("data", 0.0) / (chip.dcn_bandwidth / chip.devices)
    compute = flops * chip.devices / chip.peak_flops
    busy = max(compute, hbm_bytes * chip.devices / chip.hbm_bandwidth)
    # Collectives hide behind compute while they are shorter; a tenth of them never does.
    return max(busy, *times.values()) + sum(times.values()) / 10


def _part(n: int) -> float:
    return (n - 1) / n


def _line(result: Result, estimate: Estimate) -> str:
    mesh = " ".join(f"{axis}={n}" for axis, n in result.mesh.items())
    speed = f"{1e3 * result.bound.seconds:.3g} ms, {result.bound.limit}" if result.bound else ""
    estimated, seconds = estimate.memory / 2**30, result.compile_seconds
    verdict = "fits" if result.fits else "does not fit"
    return (
        f"  {mesh:40} {verdict}: {result.needed / 2**30:.1f} GiB per device "
        f"(estimated {estimated:.1f}), compiled in {seconds:.0f} s  {speed}"
    )
