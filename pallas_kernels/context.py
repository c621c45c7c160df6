"""What ops share whose rows are split along a mesh axis: one contiguous part on each device.

All functions are for use inside shard_map; `axis` is the mesh axis.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Summary = TypeVar("Summary")  # a pytree of arrays


def exclusive_scan(
    summary: Summary, combine: Callable[[Summary, Summary], Summary], identity: Summary, axis: str
) -> Summary:
    """`combine`d summaries of all devices before this one; on the first, `identity`.

    `combine(earlier, later)` is associative. Devices exchange with those at distances 1, 1, 2, 4,
    ... (Hillis and Steele, 1986, "Data parallel algorithms"): 1 + log2 P rounds of one summary.
    What the caller does not use of the result is not sent in the last round.
    """
    device, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)

    def from_before(tree, distance):
        pairs = [(i, i + distance) for i in range(devices - distance)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)

    def choose(condition, tree, other):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)

    result = choose(device > 0, from_before(summary, 1), identity)
    distance = 1
    while distance < devices - 1:
        longer = combine(from_before(result, distance), result)
        result = choose(device > distance, longer, result)
        distance *= 2
    return result


def end_documents(segments: Int[Array, "B T"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The first and the last document of this device's part; 0 where it is all padding."""
    real = segments != 0
    first = jnp.argmax(real, axis=1)
    last = segments.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    at = lambda index: jnp.take_along_axis(segments, index[:, None], axis=1)[:, 0]
    return at(first), at(last)


def document_continues(segments: Int[Array, "B T"], axis: str) -> Bool[Array, " B"]:
    """Whether what enters this device's part of a row belongs to the part's first document.

    True too where nothing came before, for what enters then is the row's initial state, and where
    the part is all padding, which it passes.
    """
    first, last = end_documents(segments)
    lasts = jax.lax.all_gather(last, axis)
    devices = jnp.arange(lasts.shape[0])[:, None]
    seen = (devices < jax.lax.axis_index(axis)) & (lasts != 0)
    latest = jnp.max(jnp.where(seen, devices, -1), axis=0)
    entering = jnp.take_along_axis(lasts, latest[None], axis=0)[0]
    return (first == 0) | (latest < 0) | (entering == first)


def from_last_device(x: Array, axis: str) -> Array:
    """The last device's `x`, on every device."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, x, 0), axis)
