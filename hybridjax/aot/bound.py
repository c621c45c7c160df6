"""How fast a program can be at best: compute, HBM and interconnect, each as if it were alone."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from hybridjax.aot.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds per step that each resource needs; the largest is a lower bound of the step.

    Attributes:
      axes: by the mesh axes a collective crosses, joined with "+".
      useful: FLOPs of the model itself on one chip: no recomputation.
      peak: FLOP/s of one chip.
    """

    compute: float
    hbm: float
    axes: Mapping[str, float]
    useful: float
    peak: float

    @property
    def parts(self) -> dict[str, float]:
        return {"compute": self.compute, "HBM": self.hbm, **self.axes}

    @property
    def seconds(self) -> float:
        return max(self.parts.values())

    @property
    def limit(self) -> str:
        return max(self.parts, key=self.parts.get)

    @property
    def mfu(self) -> float:
        """The ceiling: everything overlaps."""
        return self.useful / (self.peak * self.seconds)

    @property
    def mfu_serial(self) -> float:
        """The same if no collective overlapped with anything."""
        busy = max(self.compute, self.hbm) + sum(self.axes.values())
        return self.useful / (self.peak * busy)


ASSUMPTIONS = (
    "peaks of the data sheet; each matrix product at peak; collectives bandwidth-optimal on rings "
    "that use every link of the torus dimensions they span, half of them where a dimension does "
    "not wrap around; no latencies"
)


def bound(
    chip: Chip,
    mesh,
    *,
    flops: float,
    useful: float,
    hbm_bytes: float,
    sent: Mapping[tuple[str, ...], float],
) -> Bound:
    """All figures are per device and step; `sent` by the mesh axes crossed."""
    share = 1 / chip.devices
    return Bound(
        compute=flops / (chip.peak_flops * share),
        hbm=hbm_bytes / (chip.hbm_bandwidth * share),
        axes={"+".join(axes): n / bandwidth(chip, mesh, axes) for axes, n in sent.items()},
        useful=useful * chip.devices,
        peak=chip.peak_flops,
    )


def bandwidth(chip: Chip, mesh, axes: tuple[str, ...]) -> float:
    """Bytes/s that one device can send along mesh axes, from where their devices stand."""
    devices = mesh.devices
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = np.ravel(devices[index])
    if len({getattr(d, "slice_index", 0) for d in group}) > 1:
        return chip.dcn_bandwidth / chip.devices
    whole = np.array([d.coords for d in np.ravel(devices)])
    size = whole.max(axis=0) - whole.min(axis=0) + 1
    own = np.array([d.coords for d in group])
    extent = own.max(axis=0) - own.min(axis=0) + 1
    links = sum(
        2 if n == total and _wraps(chip, n) else 1
        for n, total in zip(extent, size, strict=True)
        if n > 1
    )
    return max(links, 1) * chip.link_bandwidth / chip.devices


def _wraps(chip: Chip, size: int) -> bool:
    """2D slices have wrap-around links along a side of 16, 3D ones along multiples of 4."""
    return size == 16 if chip.torus == 2 else size % 4 == 0
