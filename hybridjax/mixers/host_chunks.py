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
_LANES = 128  # of a TPU's tile
CHUNKS = ("batch", "length", None, "heads", None)
ON_HOST = ("batch", "length", "heads", None, None)
RECENT_CHUNKS = ("batch", None, None, "heads", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostChunks:
    """N chunks on the host, of which `count` are whole; of these the last M are in slot n % M on
    the device. Over the context axis each host has its part of them. There C tokens of K numbers
    are X rows of L, so that a TPU keeps each chunk in one piece."""

    keys: Float[Array, "B N G X L"]
    values: Float[Array, "B N G X L"]
    recent_keys: Float[Array, "B M C G K"]
    recent_values: Float[Array, "B M C G V"]
    count: Int[Array, " B"]

    def fetch(
        self, indices: Int[Array, "B T G J"]
    ) -> tuple[Float[Array, "B U*C G K"], Float[Array, "B U*C G V"], Int[Array, "B T G J"]]:
        """The chosen chunks, each once, and where each slot finds its own among them.

        A device fetches those of its part, and U counts what all have room for.
        """
        (B, N), C = self.keys.shape[:2], self.recent_keys.shape[2]
        axis, parts = context_axis(N), ways("length", N)
        U = min(N // parts, math.prod(indices.shape[1:]))
        flat = lambda x: ((*CHUNKS[:2], *CHUNKS[3:]), (B, parts * U * C, *x.shape[3:]))
        recent = self.recent_keys, self.recent_values
        slots = ("batch", None, None, None)
        fetch = over_mesh(
            functools.partial(_fetch, U, axis),
            (ON_HOST, ON_HOST, RECENT_CHUNKS, RECENT_CHUNKS, ("batch",), slots),
            (*map(flat, recent), (slots, indices.shape)),
        )
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
    wanted = jnp.max(jnp.sum(ids < N, axis=1))
    rows, recent = np.arange(ids.shape[0])[:, None], (device * N + ids % N) % M

    def joined(on_host, kept):
        fetched = from_host(host_memory.take(on_host, ids, wanted), *kept.shape[2:])
        chosen = jnp.where((ids >= N)[..., None, None, None], kept[rows, recent], fetched)
        return chosen.reshape(ids.shape[0], -1, *chosen.shape[3:])

    fetched = map(joined, (keys, values), (recent_keys, recent_values))
    slots = jnp.where(mine, device * U + slots.reshape(indices.shape), 0)
    slots = slots if axis is None else jax.lax.psum(slots, axis)
    return *fetched, jnp.where(indices < 0, -1, slots)


def for_host(chunks: Float[Array, "B N C G K"]) -> Float[Array, "B N G X L"]:
    """Chunks as they lie in the host's memory."""
    B, N, C, G, K = chunks.shape
    return jnp.moveaxis(chunks, 3, 2).reshape(*host_shape(B, N, C, G, K))


def from_host(
    chunks: Float[Array, "B N G X L"], C: int, G: int, K: int
) -> Float[Array, "B N C G K"]:
    return jnp.moveaxis(chunks.reshape(*chunks.shape[:2], G, C, K), 2, 3)


def host_shape(B: int, N: int, C: int, G: int, K: int) -> tuple[int, ...]:
    lanes = math.gcd(C * K, _LANES)
    return B, N, G, C * K // lanes, lanes
