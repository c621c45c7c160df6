"""The chips that `compile` knows: peaks of a data sheet, not measurements."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from hybridjax.config import UserError

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures per chip. Sources: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, read in 2026.

    Attributes:
      devices: JAX devices that one chip is.
      peak_flops: dense bf16, FLOP/s.
      hbm: bytes that a program may use, as the compiler of libtpu 0.0.42 states them when one does
        not fit; a little less than what is sold.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link in one direction: the sheets' figure, which counts both
        directions of all links, over 2 x links.
      torus: dimensions of the interconnect; two links in each.
      dcn_bandwidth: bytes/s between slices.
      unverified: fields that come from memory, not from a sheet that was read.
    """

    name: str
    device_kind: str
    devices: int
    peak_flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus: int
    dcn_bandwidth: float
    unverified: tuple[str, ...] = ()

    @property
    def assumptions(self) -> str:
        text = (
            f"{self.name}, per chip: {self.peak_flops / 1e12:.0f} TFLOP/s bf16, "
            f"HBM {self.hbm / GiB:.2f} GiB at {self.hbm_bandwidth / 1e9:.0f} GB/s, "
            f"{2 * self.torus} ICI links of {self.link_bandwidth / 1e9:.0f} GB/s each way, "
            f"DCN {self.dcn_bandwidth / 1e9:.3g} GB/s"
        )
        return text + (f" (unverified: {', '.join(self.unverified)})" if self.unverified else "")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 1, 197e12, 15.75 * GiB, 819e9, 50e9, 2, 25e9 / 8),
        Chip("v5p", "TPU v5", 1, 459e12, 95.74 * GiB, 2765e9, 100e9, 3, 50e9 / 8),
        Chip(
            "v6e", "TPU v6 lite", 1, 918e12, 31.25 * GiB, 1638e9, 100e9, 2, 100e9 / 8,
            unverified=("dcn_bandwidth",),
        ),
        Chip(
            "tpu7x", "TPU7x", 2, 2307e12, 2 * 94.75 * GiB, 7380e9, 100e9, 3, 100e9 / 8,
            unverified=("hbm_bandwidth", "link_bandwidth", "dcn_bandwidth"),
        ),
    )
}  # fmt: skip
EXAMPLES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16", "tpu7x:4x4x4", "cpu:8")


def chip_of(topology: str) -> Chip | None:
    """The chip of `v5p:4x4x4`; None for `cpu:8`, of which nothing is claimed."""
    family = topology.partition(":")[0]
    if family == "cpu":
        return None
    if family not in CHIPS:
        raise unknown(topology)
    return CHIPS[family]


def sides(topology: str) -> tuple[int, ...]:
    """The torus of JAX devices that `tpu7x:4x4x4` is: 4, 4, 4 and the 2 of a chip."""
    chip, shape = chip_of(topology), topology.partition(":")[2]
    return (*(int(n) for n in shape.split("x")), 1 if chip is None else chip.devices)


def lies_on(sizes: Sequence[int], topology: str) -> bool:
    """Whether every axis of a mesh can be a product of whole sides of the torus.

    Only then is each axis a ring, and only then does `jax.make_mesh` place it; it cuts the sides of
    v5e if it must, and the CPU has none.
    """
    if topology.startswith(("cpu:", "v5e:")):
        return True

    def place(sizes: tuple[int, ...], left: tuple[int, ...]) -> bool:
        if not sizes:
            return True
        choices = (c for n in range(len(left) + 1) for c in itertools.combinations(left, n))
        fitting = {c for c in choices if math.prod(c) == sizes[0]}
        return any(place(sizes[1:], _without(left, chosen)) for chosen in fitting)

    return place(tuple(n for n in sizes if n > 1), sides(topology))


def _without(values: Sequence[int], taken: Sequence[int]) -> tuple[int, ...]:
    rest = list(values)
    for value in taken:
        rest.remove(value)
    return tuple(rest)


def unknown(topology: str, reason: str = "") -> UserError:
    shapes = "v5e:RxC, v6e:RxC, v5p:XxYxZ, tpu7x:XxYxZ, cpu:N"
    reason = f" ({reason})" if reason else ""
    return UserError(
        f"unknown topology {topology!r}{reason}: give one of {shapes}, as {', '.join(EXAMPLES)}"
    )
