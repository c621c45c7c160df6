"""Linear maps, sharded by the logical axes of their kernels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridjax.config import UserError
from hybridjax.sharding import current_spec, place, ways


class Linear(nnx.Module):
    """`y = x W (+ b)`; the kernel's `embed` axis is gathered where it is used (FSDP)."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str, str], key: jax.Array, *, bias: bool = False
    ):
        """Args:
        shape: (inputs, outputs).
        axes: the logical axes of both; one of them is "embed".
        """
        if min(shape) < 1:
            raise UserError(f"a linear map {shape[0]} -> {shape[1]}: widths and heads are positive")
        kernel = jax.random.normal(key, shape) * shape[0] ** -0.5
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1]), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        axes = [None if axis == "embed" else axis for axis in self.kernel.get_metadata()["axes"]]
        kernel = place(self.kernel[...].astype(x.dtype), *axes)
        y = project(x, kernel, axes[1])
        if self.bias is not None:
            y = y + place(self.bias[...].astype(x.dtype), axes[1])
        return y


def project(
    x: Float[Array, "B T in"],
    kernel: Float[Array, "in out"],
    axis: str | None,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "B T out"]:
    """`x W`, accumulated and returned in `dtype`; `axis` is the logical axis of the outputs."""
    how = dict(preferred_element_type=dtype)
    if ways("batch") * ways("length") > 1:
        out = current_spec(("batch", "length", axis), (*x.shape[:2], kernel.shape[1]))
        return jnp.einsum("bti,io->bto", x, kernel, out_sharding=out, **how)
    # As one matrix of all tokens: XLA's CPU backend would otherwise transpose the cotangent of
    # the outputs for the kernel's gradient, which costs more than the product.
    rows = x.reshape(-1, x.shape[2])
    out = current_spec((None, axis), (rows.shape[0], kernel.shape[1]))
    y = jnp.einsum("ti,io->to", rows, kernel, out_sharding=out, **how)
    return y.reshape(*x.shape[:2], -1)


def split_heads(y: Float[Array, "B T HK"], head_dim: int) -> Float[Array, "B T H K"]:
    """Splits the last axis into heads; they stay sharded if they divide among the devices."""
    heads = y.shape[-1] // head_dim
    y = place(y, "batch", "length", "heads" if heads % ways("heads") == 0 else None)
    return y.reshape(*y.shape[:2], heads, head_dim)


def repeat_heads(x: Float[Array, "B T G K"], times: int) -> Float[Array, "B T H K"]:
    """Each head `times` times in a row: head i of the result is head i // times of `x`."""
    if times == 1:
        return x
    repeated = jnp.repeat(x[:, :, :, None], times, axis=3)
    return repeated.reshape(*x.shape[:2], -1, x.shape[3])
