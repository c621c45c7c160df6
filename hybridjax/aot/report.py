"""What `compile` prints."""

from collections.abc import Iterator

from hybridjax.aot.bill import Bill
from hybridjax.aot.bound import ASSUMPTIONS
from hybridjax.aot.hardware import GiB
from hybridjax.aot.measure import Result
from hybridjax.aot.program import ON_HOST
from hybridjax.aot.topology import Target
from hybridjax.config import Config


def lines(result: Result, config: Config, target: Target) -> Iterator[str]:
    """The report of one compiled program, line by line."""
    job, per_chip = result.job, target.devices_per_chip
    what = (
        f"{config.batch_size} rows of {config.seq_len:,} tokens, accumulate {config.accumulate}"
        if not job.context
        else f"{job.rows} rows, context {job.context:,}, {result.tokens} tokens per call"
    )
    mesh = " ".join(f"{name}={size}" for name, size in result.mesh.items())
    slices = f" x {result.slices} slices" if result.slices > 1 else ""
    yield f"{config.name} {config.model.layers} on {result.topology}{slices}: {result.chips} chips"
    yield f"{job.program}: {what}; mesh {mesh}; remat {config.model.remat}"
    yield (
        f"{result.bodies} compiled bodies, traced and lowered in {result.trace_seconds:.0f} s, "
        f"compiled in {result.compile_seconds:.0f} s"
    )
    yield ""
    yield from _memory(result, per_chip)
    if result.memory is not None:
        yield from _traffic(result)
    if result.bound is not None:
        yield from _bound(result, target)
    if not result.fits:
        yield from _advice(result)


def _memory(result: Result, per_chip: int) -> Iterator[str]:
    yield "bytes per chip" + (f" ({per_chip} devices)" if per_chip > 1 else "")
    row = lambda name, size, note="": f"  {name:22}{_gib(size * per_chip):>12}{note}"
    for name, size in result.parts.items():
        beside = ", not in the total" if name == ON_HOST else ""
        yield row(name, size, f"  by arithmetic from the shardings{beside}")
    if (memory := result.memory) is not None:
        yield row("arguments", memory.arguments, "  as laid out, the above padded to tiles")
        yield row("outputs", memory.outputs, "  besides those in place of arguments")
        yield row("temporaries", memory.temporaries, "  activations, gradients, gathered weights")
        yield row("program", memory.code)
    limit = "" if result.available is None else f"  of {_gib(result.available * per_chip).strip()}"
    verdict = "" if result.available is None else (", fits" if result.fits else ", DOES NOT FIT")
    least = "at least " if result.memory is None else ""
    yield row("total", result.needed, f"  {least.strip()}{limit}{verdict}".rstrip())
    yield ""


def _traffic(result: Result) -> Iterator[str]:
    hidden = f", {result.hidden / result.flops:.0%} of it by formula" if result.hidden else ""
    yield (
        f"per step and device: {_number(result.flops)}FLOP{hidden}; "
        f"HBM {_number(result.hbm_bytes)}B"
    )
    if result.unknown_loops:
        yield f"  loops of unknown length, counted once: {', '.join(set(result.unknown_loops))}"
    for c in result.collectives:
        axes = "+".join(c.axes)
        yield f"  {c.kind:20}{axes:18}{c.count:8.0f} x, sends {_number(c.sent)}B"
    if not result.collectives:
        yield "  no collectives"
    yield ""


def _bound(result: Result, target: Target) -> Iterator[str]:
    limits = result.bound
    parts = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in limits.parts.items())
    yield f"lower bounds of a step: {parts}"
    if not result.job.context:
        yield (
            f"limit: {limits.limit}; MFU at most {limits.mfu:.1%} if everything overlaps, "
            f"{limits.mfu_serial:.1%} if no collective does"
        )
    else:
        least = result.on_device * target.devices_per_chip / target.chip.hbm_bandwidth
        yield f"weights and state read once from HBM would take {1e3 * least:.3g} ms"
    rate = result.tokens / limits.seconds
    yield f"at most {rate:,.0f} tokens/s in all, {rate / result.chips:,.0f} per chip"
    yield f"assumed: {target.chip.assumptions}; {ASSUMPTIONS}"
    yield ""


def _advice(result: Result) -> Iterator[str]:
    yield "largest buffers of a device:"
    yield from (f"  {line}" for line in result.largest)
    yield "what would help, estimated per device:"
    for change in result.changes:
        yield f"  saves about {_gib(change.saves).strip():>10}: {change.what}"


def bill_lines(bill: Bill, mesh: dict[str, int] | None = None) -> Iterator[str]:
    """The bill of a stack, per letter and in sum."""
    yield (
        f"forward at {bill.length:,} tokens; one letter of each, then all. A decoding step reads "
        "weights once for all rows, and a row's state."
    )
    header = ("letter", "times", "parameters", "FLOP/token", "decode FLOP", "weights B",
              "state B/token", "constant B", "fsdp gathers B", "tensor adds B/token")  # fmt: skip
    yield "  ".join(f"{h:>14}" for h in header)
    fields = ("parameters", "flops", "decode_flops", "weight_bytes", "state_per_token",
              "state_constant", "gathered_bytes", "reduced_bytes")  # fmt: skip
    for item, times in bill.items:
        cells = [item.name, str(times), *(_number(getattr(item, f)) for f in fields)]
        yield "  ".join(f"{c:>14}" for c in cells)
        if item.unknown:
            yield f"  {item.name}: FLOPs of {', '.join(item.unknown)} in loops are not known"
    cells = ["all", "", *(_number(bill.total(f)) for f in fields)]
    yield "  ".join(f"{c:>14}" for c in cells)
    state = bill.state_bytes(bill.length)
    yield (
        f"state of a row of {bill.length:,} tokens: {_number(state)}B; "
        f"a decoded token reads {_number(bill.total('weight_bytes') + state)}B"
    )
    if mesh:
        yield from _sent(bill, mesh)


def _sent(bill: Bill, mesh: dict[str, int]) -> Iterator[str]:
    part = lambda n: (n - 1) / n
    fsdp, tensor = mesh.get("fsdp", 1), mesh.get("tensor", 1)
    if fsdp > 1:
        sent = part(fsdp) * bill.total("gathered_bytes") / tensor
        yield f"fsdp={fsdp}: a device sends {_number(sent)}B to gather weights for a forward pass"
    if tensor > 1:
        sent = 2 * part(tensor) * bill.total("reduced_bytes")
        yield f"tensor={tensor}: a device sends {_number(sent)}B per token of its rows, forward"


def _gib(size: float) -> str:
    for unit, letter in ((GiB, "G"), (2**20, "M")):
        if size >= unit / 10:
            return f"{size / unit:.2f} {letter}iB"
    return f"{size / 2**10:.2f} KiB"


def _number(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "
