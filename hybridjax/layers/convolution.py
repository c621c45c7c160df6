"""The short convolution before a recurrent mixer's queries, keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.sharding import context_axis, over_mesh, place
from pallas_kernels.causal_convolution import causal_convolution


class ShortConvolution(nnx.Module):
    """`silu` of each channel's last `size` inputs, weighted; documents do not see one another."""

    def __init__(self, channels: int, size: int, key: jax.Array, *, bias: bool = False):
        self.size = size
        # PyTorch's default for a depthwise convolution, which published models start from.
        bound = size**-0.5
        kernel = jax.random.uniform(key, (channels, size), minval=-bound, maxval=bound)
        self.kernel = nnx.Param(kernel, axes=("heads", "taps"))
        self.bias = nnx.Param(jnp.zeros(channels), axes=("heads",)) if bias else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int[Array, "B T"],
        tail: Float[Array, "B size-1 D"] | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B size-1 D"]]:
        """`tail`: the inputs before the rows; returned as the inputs at their end."""
        rows, tails = ("batch", "length", "heads"), ("batch", None, "heads")
        axis = context_axis(x.shape[1])

        def convolve(x, kernel, segments, tail):
            return causal_convolution(
                x, kernel, segments=segments, initial_state=tail, output_final_state=True,
                context_axis=axis,
            )  # fmt: skip

        y, tail = over_mesh(
            convolve,
            in_axes=(rows, ("heads", "taps"), ("batch", "length"), tails),
            out_axes=((rows, x.shape), (tails, (x.shape[0], self.size - 1, x.shape[2]))),
        )(x, self.kernel[...], segments, tail)
        if self.bias is not None:
            y = y + place(self.bias[...].astype(y.dtype), "heads")
        return jax.nn.silu(y), tail
