"""Devices of a named topology that need not exist: libtpu describes TPUs, the CPU simulates."""

import dataclasses
import importlib.util
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.extend import backend
from jax.sharding import AxisType

from hybridjax.aot.hardware import Chip, chip_of, unknown
from hybridjax.config import MeshConfig, UserError
from hybridjax.sharding import MESH_AXES, make_mesh

_ENVIRONMENT = {  # read once, when libtpu is loaded
    "TPU_SKIP_MDS_QUERY": "1",  # this host is not a TPU VM: ask no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no device, so no lock
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for."""

    name: str
    chip: Chip | None  # None: simulated CPU devices
    devices: tuple[jax.Device, ...]
    slices: int

    @property
    def devices_per_chip(self) -> int:
        return 1 if self.chip is None else self.chip.devices

    def mesh(self, config: MeshConfig) -> jax.sharding.Mesh:
        """`make_mesh`'s; of several slices, the data axis runs over them, the others within."""
        if self.slices == 1:
            try:
                return make_mesh(config, self.devices)
            except NotImplementedError as error:
                sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
                raise UserError(
                    f"mesh {sizes} does not lie on the torus of {self.name}: make each axis a "
                    "product of whole sides, or let --sweep choose"
                ) from error
        sizes = tuple(getattr(config, axis) for axis in MESH_AXES)
        rest = len(self.devices) // int(np.prod([size for size in sizes if size > 0]))
        sizes = tuple(rest if size == -1 else size for size in sizes)
        if int(np.prod(sizes)) != len(self.devices) or sizes[0] % self.slices:
            named = dict(zip(MESH_AXES, sizes, strict=True))
            raise UserError(
                f"mesh {named} does not fit {self.slices} slices of "
                f"{len(self.devices) // self.slices} devices: make data a multiple of the slices"
            )
        within = (sizes[0] // self.slices, *sizes[1:])
        across = (self.slices, 1, 1, 1)
        devices = mesh_utils.create_hybrid_device_mesh(within, across, self.devices)
        return jax.sharding.Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)


def target(name: str, slices: int = 1) -> Target:
    """The devices of `v5p:4x4x4` or `cpu:8`.

    Raises:
      UserError: no such topology, or libtpu is not installed.
    """
    chip = chip_of(name)
    shape = name.partition(":")[2]
    if not re.fullmatch(r"\d+(x\d+)*", shape) or slices < 1:
        raise unknown(name, "" if slices > 0 else f"{slices} slices")
    if chip is None:
        if not shape.isdigit() or int(shape) < 1 or slices > 1:
            raise unknown(name, "the CPU has one number of devices and one slice")
        return Target(name, None, _simulated(int(shape)), 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"{name} needs libtpu to compile: pip install 'hybridjax[tpu]'")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except (RuntimeError, ValueError) as error:
        raise unknown(name, str(error).splitlines()[0]) from error
    return Target(name, chip, tuple(description.devices), slices)


def _simulated(count: int) -> tuple[jax.Device, ...]:
    if len(jax.devices("cpu")) < count:
        backend.clear_backends()
        jax.config.update("jax_num_cpu_devices", count)
    return tuple(jax.devices("cpu")[:count])
