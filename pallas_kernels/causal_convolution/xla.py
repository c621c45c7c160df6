"""W shifted copies of the row, each times its column of the kernel.

Only the inputs are kept for the backward pass: copies and masks are made again.
"""

import jax
import jax.numpy as jnp
import numpy as np


def causal_convolution(x, kernel, *, initial_state, segments, output_final_state):
    (B, T, D), W = x.shape, kernel.shape[1]
    if initial_state is None:
        initial_state = jnp.zeros_like(x, shape=(B, W - 1, D))
    initial_state = initial_state.astype(x.dtype)
    if segments is None:
        inputs = jnp.concatenate([initial_state, x], axis=1)
        return _weighted(inputs, kernel, None, None), inputs[:, T:]
    inputs, documents = _behind_state(x, initial_state, segments)
    state = final_state(x, initial_state, segments) if output_final_state else None
    return _weighted(inputs, kernel, documents, segments), state


@jax.checkpoint
def _weighted(inputs, kernel, documents, segments):
    """`inputs` and `documents` begin W - 1 places before the row and its `segments`."""
    W = kernel.shape[1]
    T = inputs.shape[1] - W + 1
    kernel = kernel.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    y = 0
    for w in range(W):
        part = inputs[:, w : w + T]
        if segments is not None:
            seen = (documents[:, w : w + T] == segments) & (segments != 0)
            part = jnp.where(seen[..., None], part, 0)
        y += part * kernel[:, w]
    return y.astype(inputs.dtype)


def _behind_state(x, state, segments):
    """The row with the state right before its first real token, and the documents of both."""
    W = state.shape[1] + 1
    first = jnp.argmax(segments != 0, axis=1)[:, None]
    document = jnp.take_along_axis(segments, first, axis=1)
    rows, places = np.arange(x.shape[0])[:, None], first + np.arange(W - 1)
    inputs = jnp.pad(x, [(0, 0), (W - 1, 0), (0, 0)]).at[rows, places].set(state)
    documents = jnp.pad(segments, [(0, 0), (W - 1, 0)]).at[rows, places].set(document)
    return inputs, documents


def final_state(x, state, segments):
    """The inputs up to the last real token, of its document; the state where there is none."""
    inputs, documents = _behind_state(x, state, segments)
    T, size = segments.shape[1], state.shape[1]
    last = jnp.max(jnp.where(segments != 0, np.arange(T), -1), axis=1)[:, None]
    places = last + 1 + np.arange(size)
    state = jnp.take_along_axis(inputs, places[..., None], axis=1)
    document = jnp.take_along_axis(documents, last + size, axis=1)
    same = jnp.take_along_axis(documents, places, axis=1) == document
    return jnp.where(same[..., None], state, 0)
