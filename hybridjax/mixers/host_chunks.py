"""Keys and values of chunks in the host's memory, of which a device fetches those that were chosen.

The landmarks of a row of millions of tokens fit on a device, and its keys and values need not: a
token reads few of them. What a call reads is fetched once, however many tokens, heads and layers
read it, and the last chunks of the row are on the device anyway.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax import host_memory
from hybridjax.sharding import context_axis, over_mesh, ways

RECENT = 64  # chunks that the device keeps too
_FETCHED = 64  # chunks at a time
CHUNKS = ("batch", "length", None, "heads", None)
RECENT_CHUNKS = ("batch", None, None, "heads", None)
Pair = tuple[Array, Array]  # keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostChunks:
    """N chunks on the host, of which `count` are whole; of these the last M are in slot n % M on
    the device. Over the context axis each host has its part of them."""

    keys: Float[Array, "B N C G K"]
    values: Float[Array, "B N C G V"]
    recent_keys: Float[Array, "B M C G K"]
    recent_values: Float[Array, "B M C G V"]
    count: Int[Array, " B"]

    def fetch(
        self, indices: Int[Array, "B T G J"]
    ) -> tuple[Float[Array, "B U*C G K"], Float[Array, "B U*C G V"], Int[Array, "B T G J"]]:
        """The chosen chunks, each once, and where each slot finds its own among them.

        A device fetches those of its part, and U counts what all have room for.
        """
        B, N, C = self.keys.shape[:3]
        axis, parts = context_axis(N), ways("length", N)
        U = min(N // parts, math.prod(indices.shape[1:]))
        flat = lambda x: ((*CHUNKS[:2], *CHUNKS[3:]), (B, parts * U * C, *x.shape[3:]))
        slots = ("batch", None, None, None)
        fetch = over_mesh(
            functools.partial(_fetch, U, axis),
            (CHUNKS, CHUNKS, RECENT_CHUNKS, RECENT_CHUNKS, ("batch",), slots),
            (flat(self.keys), flat(self.values), (slots, indices.shape)),
        )
        recent = self.recent_keys, self.recent_values
        return fetch(self.keys, self.values, *recent, self.count, indices)


def _fetch(U: int, axis: str | None, keys, values, recent_keys, recent_values, count, indices):
    """`axis`: the mesh axis along which the chunks are split."""
    N, M = keys.shape[1], recent_keys.shape[1]
    device = 0 if axis is None else jax.lax.axis_index(axis)
    mine = (indices >= device * N) & (indices < (device + 1) * N)  # also: not an empty slot
    ids, none = indices.reshape(indices.shape[0], -1) - device * N, 2 * N
    # Sorted, those that only the host has come first, then those on the device, then empty slots.
    ids = jnp.where(ids >= jnp.maximum(count[:, None] - M, 0) - device * N, N + ids, ids)
    unique = functools.partial(jnp.unique, size=U, fill_value=none, return_inverse=True)
    ids, slots = jax.vmap(unique)(jnp.where(mine.reshape(ids.shape), ids, none))
    from_host = _from_host((keys, values), ids, jnp.max(jnp.sum(ids < N, axis=1)))
    rows, recent = np.arange(ids.shape[0])[:, None], (device * N + ids % N) % M

    def joined(fetched, kept):
        chosen = jnp.where((ids >= N)[..., None, None, None], kept[rows, recent], fetched)
        return chosen.reshape(ids.shape[0], -1, *chosen.shape[3:])

    fetched = map(joined, from_host, (recent_keys, recent_values))
    slots = jnp.where(mine, device * U + slots.reshape(indices.shape), 0)
    slots = slots if axis is None else jax.lax.psum(slots, axis)
    return *fetched, jnp.where(indices < 0, -1, slots)


def _from_host(chunks: Pair, ids: Int[Array, "B U"], wanted: Int[Array, ""]) -> Pair:
    """The first `wanted` chunks of each row, some at a time; those behind may be anything."""
    (B, U), N = ids.shape, chunks[0].shape[1]
    step = min(U, _FETCHED)
    ids = jnp.pad(jnp.minimum(ids, N - 1), ((0, 0), (0, -U % step)))

    def some(i, fetched):
        at = jax.lax.dynamic_slice_in_dim(ids, i * step, step, axis=1)
        put = lambda to, x: jax.lax.dynamic_update_slice_in_dim(
            to, host_memory.take(x, at), i * step, axis=1
        )
        return tuple(map(put, fetched, chunks))

    blank = tuple(jnp.zeros((B, ids.shape[1], *x.shape[2:]), x.dtype) for x in chunks)
    fetched = jax.lax.fori_loop(0, -(-wanted // step), some, blank)
    return tuple(x[:, :U] for x in fetched)
