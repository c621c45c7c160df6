"""How `op(..., implementation=...)` chooses the code that runs."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence

import jax


def target_platform() -> str:
    """Platform compiled for: that of the mesh in use if it tells, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_kind() -> str:
    """The kind of device compiled for, such as "TPU v5p" or "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
        device = jax.devices(device)[0] if isinstance(device, str) else device
    return device.device_kind


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The implementations of one op.

    An implementation is the file `<name>.py` of the op's package and holds a function named like
    the op. It is imported when first used, so a backend that is not installed costs nothing. It
    raises NotImplementedError(reason) for what it cannot serve.
    """

    op: str
    package: str
    names: tuple[str, ...]
    best: Mapping[str, tuple[str, ...]]  # platform -> names, in the order to try
    fallback: tuple[str, ...] = ("xla",)  # for platforms not named in `best`

    def __call__(self, implementation: str | Sequence[str] | None, *args, **kwargs):
        if isinstance(implementation, str):
            return self._load(implementation)(*args, **kwargs)
        if implementation is None:
            implementation = self.best.get(target_platform(), self.fallback)
        reasons = []
        for name in implementation:
            try:
                return self._load(name)(*args, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
        raise NotImplementedError(f"{self.op}: no implementation serves ({'; '.join(reasons)})")

    def _load(self, name: str):
        if name not in self.names:
            known = ", ".join(self.names)
            raise ValueError(f"{self.op}: implementation {name!r} is unknown; known are {known}")
        try:
            module = importlib.import_module(f"{self.package}.{name}")
        except ImportError as error:
            raise NotImplementedError(f"cannot be imported ({error})") from error
        return getattr(module, self.op)
