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


def on_split_row(
    op: Callable,
    part: Summary,
    identity: Summary,
    continues: Bool[Array, " B"] | None,
    axis: str,
    initial_state: Array | None,
    output_final_state: bool,
) -> tuple[Array, Array | None]:
    """`op` on this device's part of a row, from the state that enters it; the row's final state.

    Args:
      op: takes `initial_state` and `output_final_state`.
      part: the part as a map of the state that enters its first document: called with a state, or
        None for the row's first, it gives the state that leaves, and `then` composes two. It
        forgets what enters where `continues` is false.
      identity: the map of a part of no tokens.
      continues: see `document_continues`; None where rows are whole documents.
    """
    state = exclusive_scan(part, type(part).then, identity, axis)(initial_state)
    if continues is not None:
        state = jnp.where(jnp.expand_dims(continues, range(1, state.ndim)), state, 0)
    o, state = op(initial_state=state, output_final_state=output_final_state)
    return o, from_last_device(state, axis) if output_final_state else None


def from_last_device(x: Array, axis: str) -> Array:
    """The last device's `x`, on every device."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, x, 0), axis)
