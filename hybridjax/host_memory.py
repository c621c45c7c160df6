"""Arrays in the memory of the host beside a device: what little is done with them there.

A device reads such an array only through `take`, and changes it through `write`. The CPU backend
has the same two kinds of memory, and there both are the machine's.
"""

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


def take(
    x: Shaped[Array, "B N ..."], index: Int[Array, "B M"], count: Int[Array, ""]
) -> Shaped[Array, "B M ..."]:
    """`x[b, index[b]]` of an array on the host, on the device: the first `count` of each row, zeros
    behind."""
    rows = x.shape[0]

    def one(i, taken):
        row, slot = i % rows, i // rows
        part = to_device(_one(x, row, index[row, slot]))
        return _put(taken, part, row, slot)

    blank = jnp.zeros((*index.shape, *x.shape[2:]), x.dtype)
    return jax.lax.fori_loop(0, count * rows, one, blank)


def write(
    x: Shaped[Array, "B N ..."], new: Shaped[Array, "B M ..."], index: Int[Array, "B M"]
) -> Shaped[Array, "B N ..."]:
    """`x` on the host with `new` in its rows' slots `index`, those out of range left out."""
    rows, slots, new = x.shape[0], x.shape[1], new.astype(x.dtype)

    def one(i, x):
        row, slot = i % rows, index[i % rows, i // rows]
        old, part = to_device(_one(x, row, slot)), _one(new, row, i // rows)
        return _put(x, to_host(jnp.where(slot < slots, part, old)), row, slot)

    return jax.lax.fori_loop(0, new.shape[1] * rows, one, x)


# One slice at a time, and no gather or scatter on the host: the TPU compiler makes of such a slice
# one transfer, and of the others copies of the whole array to the device, and back.


def _one(x: Array, row: Array, slot: Array) -> Array:
    start = (row, slot, *[0] * (x.ndim - 2))
    return jax.lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))


def _put(x: Array, part: Array, row: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice(x, part, (row, slot, *[0] * (x.ndim - 2)))


def repeat(x: Shaped[Array, "1 ..."], count: int) -> Shaped[Array, "B ..."]:
    """`x` on the host, `count` times."""
    rows = _compute_on(
        lambda x: jnp.repeat(x, count, axis=0), compute_type="device_host", out_memory_spaces=HOST
    )
    return jax.jit(lambda x: rows(to_host(x)))(x)


def free_bytes() -> int | None:
    """Bytes that this machine can give without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:
        return None
