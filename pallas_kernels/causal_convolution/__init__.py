"""Short depthwise convolution over the past, as before linear attention and state-space layers.

`y_t = sum_w kernel[:, w] x_{t - W + 1 + w}` (Mamba, Gu & Dao, 2023,
https://arxiv.org/abs/2312.00752, section 3.4, whose `conv1d.weight` is `kernel[:, None]`).
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays
from pallas_kernels.causal_convolution.context import split_causal_convolution
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.precision import exact_products

_dispatch = Dispatch("causal_convolution", __name__, names=("reference", "xla"), best={})


@exact_products
def causal_convolution(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D W"],
    *,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    output_final_state: bool = False,
    context_axis: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"] | None]:
    """Each channel's last W inputs, weighted; the last column of the kernel is of the newest.

    Decoding is the same function with T = 1 and the state.

    Args:
      initial_state: the W - 1 inputs before the row's first document, newest last; default zero.
      segments: document ids, each one contiguous run; 0 = padding. No document sees another.
        Padding leaves the state as it is, and its outputs are 0.
      output_final_state: also return the inputs up to the row's last real token.
      context_axis: inside shard_map, the mesh axis along which rows are split: x and segments are
        this device's contiguous part of T; the states are those of the whole row, the same on
        every device.
      implementation: None (best for the target platform), a name, or names to try in order.

    Returns:
      The outputs in x's dtype, summed in f32, and the state in x's dtype (None unless asked for).
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    _check_shapes(x, kernel, initial_state, segments)
    op = functools.partial(_dispatch, implementation)
    if context_axis is not None:
        op = functools.partial(split_causal_convolution, op, context_axis)
    y, state = op(x, kernel, initial_state=initial_state, segments=segments,
                  output_final_state=output_final_state)
    return y, state if output_final_state else None


def _check_shapes(x, kernel, initial_state, segments):
    if x.ndim != 3 or kernel.ndim != 2:
        raise ValueError(f"x must have rank 3 and kernel rank 2, [B, T, D] and [D, W], got "
                         f"{list(x.shape)} and {list(kernel.shape)}")
    (B, T, D), W = x.shape, kernel.shape[1]
    if T == 0 or W == 0:
        raise ValueError(f"T and W must be at least 1, got {T} and {W}")
    expected = {
        "x": (x, (B, T, D)),
        "kernel": (kernel, (D, W)),
        "initial_state": (initial_state, (B, W - 1, D)),
        "segments": (segments, (B, T)),
    }
    check_arrays(expected, of=f"x {list(x.shape)} and kernel {list(kernel.shape)}")
