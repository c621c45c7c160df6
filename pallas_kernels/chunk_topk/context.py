"""The k best chunks of a row whose landmarks are split along a mesh axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def best_of_parts(
    indices: Int[Array, "B T G J"], scores: Float[Array, "B T G J"], first: Int[Array, ""],
    axis: str,
) -> tuple[Int[Array, "B T G J"], Float[Array, "B T G J"]]:
    """Of what each device has chosen from its part, which begins at chunk `first` of the row, the J
    best of all parts, on every device.

    The J best of the row are among the J best of their parts, so this is the choice from the row.
    """
    J = indices.shape[-1]
    indices = jnp.where(indices < 0, -1, first + indices)
    gather = lambda x: jax.lax.all_gather(-x, axis, axis=3, tiled=True)
    scores, indices = jax.lax.sort((gather(scores), gather(indices)), num_keys=2)
    indices, scores = jax.lax.sort((indices[..., :J], scores[..., :J]), num_keys=1)
    return -indices, -scores
