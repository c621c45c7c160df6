"""Tracing for devices that are not there."""

import contextlib

from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def targeting(device_kind, platform="cuda", num_cores=None):
    """In which what is traced is for such a device, if any."""
    if device_kind is None:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))
