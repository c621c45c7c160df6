"""Arrays in the memory of the host beside a device: what little is done with them there.

A device reads such an array only through `take`. The CPU backend has the same two kinds of memory,
and there both are the machine's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jaxtyping import Array, Int, Shaped

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"  # as a sharding names it
_compute_on = getattr(compute_on, "compute_on2", compute_on.compute_on)  # its name before JAX 0.12


def is_on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == HOST


def to_host(x: Array) -> Array:
    return jax.device_put(x, HOST)


def to_device(x: Array) -> Array:
    return jax.device_put(x, DEVICE)


def take(x: Shaped[Array, "B N ..."], index: Int[Array, "B M"]) -> Shaped[Array, "B M ..."]:
    """`x[b, index[b]]` of an array on the host, gathered there, on the device."""
    rows = jax.vmap(lambda row, at: row[at])
    return to_device(_on_host(rows)(x, index))


def write(
    x: Shaped[Array, "B N ..."], new: Shaped[Array, "B M ..."], index: Int[Array, "B M"]
) -> Shaped[Array, "B N ..."]:
    """`x` on the host with `new` in its rows' slots `index`, those out of range left out."""

    def set_rows(x, new, index):
        return jax.vmap(lambda row, new, at: row.at[at].set(new, mode="drop"))(x, new, index)

    return _on_host(set_rows)(x, new.astype(x.dtype), index)


def repeat(x: Shaped[Array, "1 ..."], count: int) -> Shaped[Array, "B ..."]:
    """`x` on the host, `count` times."""
    return jax.jit(_on_host(lambda x: jnp.repeat(x, count, axis=0)))(x)


def free_bytes() -> int | None:
    """Bytes that this machine can give without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:
        return None


def _on_host(f: Callable) -> Callable:
    compute = _compute_on(f, compute_type="device_host", out_memory_spaces=HOST)
    return lambda *arrays: compute(*map(to_host, arrays))
