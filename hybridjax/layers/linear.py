"""Linear maps, sharded by the logical axes of their kernels."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridjax.config import UserError
from hybridjax.sharding import RULES, current_spec, over_mesh, place, ways


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
        axes = tuple(self.kernel.get_metadata()["axes"])
        y = gathered_project(x, self.kernel[...].astype(x.dtype), axes)
        if self.bias is not None:
            y = y + place(self.bias[...].astype(x.dtype), _whole(axes[1]))
        return y


def gathered_project(
    x: Float[Array, "B T in"], kernel: Float[Array, "in out"], axes: tuple[str, str]
) -> Float[Array, "B T out"]:
    """`x W`, with the kernel gathered along its `embed` axis (FSDP)."""
    rows, ways_of_rows = x.shape[:2], ways("batch") * ways("length")
    cut = ways("batch", rows[0]) * ways("length", rows[1]) == ways_of_rows
    if cut and ways("embed", kernel.shape[axes.index("embed")]) > 1:
        return _scattering_project(x, kernel, axes)
    return _project_whole(x, kernel, axes)


def _project_whole(x, kernel, axes):
    return project(x, place(kernel, *map(_whole, axes)), _whole(axes[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scattering_project(x, kernel, axes):
    """The same, with the kernel's gradient scattered as it is summed.

    Otherwise every device gets the sum of the whole gradient and cuts its part out of it, which
    sends about twice as much; XLA joins the two for few meshes and layouts only.
    """
    return _project_whole(x, kernel, axes)


def _forward(x, kernel, axes):
    return _project_whole(x, kernel, axes), (x, kernel)


def _backward(axes, residuals, dy):
    x, kernel = residuals
    gathered = place(kernel, *map(_whole, axes))
    dx = jnp.einsum("bto,io->bti", dy, gathered, out_sharding=jax.typeof(x).sharding)
    mesh = jax.sharding.get_abstract_mesh()
    over = [RULES.mesh_axes(axis, mesh) for axis in ("batch", "length", "embed")]
    scattered = over.pop()
    summed = tuple(n for names in over for n in names if n not in scattered)

    def gradient(x, dy):
        dw = jnp.einsum("bti,bto->io", x, dy)
        dw = jax.lax.psum_scatter(
            dw, scattered, scatter_dimension=axes.index("embed"), tiled=True
        )
        return jax.lax.psum(dw, summed)

    in_axes = tuple(("batch", "length", _whole(axis)) for axis in axes)
    return dx, over_mesh(gradient, in_axes, (axes, kernel.shape))(x, dy)


_scattering_project.defvjp(_forward, _backward)


def _whole(axis: str | None) -> str | None:
    return None if axis == "embed" else axis


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


def place_heads(x: Float[Array, "B T G K"]) -> Float[Array, "B T G K"]:
    """Whole rows on every device of the context axis, heads sharded if they divide."""
    return place(x, "batch", None, "heads" if x.shape[2] % ways("heads") == 0 else None, None)


def repeat_heads(x: Float[Array, "B T G K"], times: int) -> Float[Array, "B T H K"]:
    """Each head `times` times in a row: head i of the result is head i // times of `x`."""
    if times == 1:
        return x
    repeated = jnp.repeat(x[:, :, :, None], times, axis=3)
    return repeated.reshape(*x.shape[:2], -1, x.shape[3])
