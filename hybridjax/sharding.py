"""Where arrays live: one table from logical axes to mesh axes, and the three ways to apply it.

Meshes have explicit axis types, so every array's placement is part of its type and is checked at
trace time. Without a mesh all functions here do nothing, and the code is plain single-device JAX.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hybridjax.config import MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axes. `None` as a logical axis is never sharded."""

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("context",)  # tokens of the residual stream
    embed: tuple[str, ...] = ("fsdp",)  # parameters' model width; gathered where they are used
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    taps: tuple[str, ...] = ()  # of a convolution

    def mesh_axes(self, axis: str, mesh) -> tuple[str, ...]:
        """The mesh axes of a logical axis; not those over which `over_mesh` has cut already."""
        names = getattr(self, axis)
        return tuple(n for n in names if mesh.shape[n] > 1 and n not in mesh.manual_axes)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh) -> P:
        """The partition of an array with these logical axes and this shape.

        An axis whose size the mesh axes do not divide is replicated, with one warning.

        Raises:
          ValueError: two axes of one array would be laid on the same mesh axis.
        """
        entries, used = [], set()
        for axis, size in zip(axes, shape, strict=True):
            names = () if axis is None else self.mesh_axes(axis, mesh)
            ways = math.prod(mesh.shape[n] for n in names)
            if size % ways:
                if size > 1:  # one token, as in decoding, is not meant to be split
                    _warn_once(
                        f"axis {axis} of size {size} is replicated: {ways} does not divide it"
                    )
                names = ()
            if used & set(names):
                raise ValueError(f"axes {tuple(axes)} put two dimensions on mesh axis {names}")
            used |= set(names)
            entries.append(names if len(names) > 1 else names[0] if names else None)
        return P(*entries)


RULES = ShardingRules()


@functools.cache
def _warn_once(line: str) -> None:
    logging.getLogger("hybridjax").warning(line)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a run, with the axes of `MESH_AXES`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {sizes}: at most one axis may be -1")
    asked, left = dict(sizes), count
    for axis in sorted(sizes, key=lambda axis: sizes[axis] == -1):  # a free one comes last
        sizes[axis] = left if sizes[axis] == -1 else sizes[axis]
        if sizes[axis] < 1 or left % sizes[axis]:
            raise _does_not_fit(asked, count, axis, left)
        left //= sizes[axis]
    if left > 1:
        raise UserError(
            f"mesh {asked} uses {count // left} of {count} devices: set --config.mesh.data="
            f"{sizes['data'] * left} or another axis to -1"
        )
    types = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, types, devices=devices)


def _does_not_fit(asked: dict[str, int], count: int, axis: str, left: int) -> UserError:
    sizes = [size for size in range(1, left + 1) if left % size == 0]
    below = max((size for size in sizes if size < asked[axis]), default=None)
    above = min((size for size in sizes if size > asked[axis]), default=None)
    nearest = " or ".join(str(size) for size in (below, above) if size)
    others = "" if left == count else f" ({left} are left for it)"
    return UserError(
        f"mesh {asked} does not fit {count} devices{others}: set --config.mesh.{axis}={nearest}"
    )


def current_spec(axes: Sequence[str | None], shape: Sequence[int]) -> P | None:
    """The partition under the mesh that is set, or None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else RULES.spec(axes, shape, mesh)


def named_sharding(axes: Sequence[str | None], shape: Sequence[int]) -> jax.sharding.NamedSharding:
    """The same for an array that is made on the host, under a mesh of devices."""
    return jax.NamedSharding(jax.sharding.get_mesh(), current_spec(axes, shape))


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, moved to where the table puts an array with these logical axes."""
    spec = current_spec(axes, x.shape)
    return x if spec is None else jax.reshard(x, spec)


def place_parameters(module: nnx.Module) -> nnx.Module:
    """The module with each parameter where its `axes` say; stacked layers are not sharded."""

    def move(leaf):
        axes = parameter_axes(leaf)
        return leaf.replace(place(leaf[...], *axes))

    return jax.tree.map(move, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def parameter_axes(parameter: nnx.Param) -> tuple[str | None, ...]:
    """One logical axis per dimension; leading ones that the parameter does not name are None."""
    axes = parameter.get_metadata()["axes"]
    return (None,) * (len(parameter.shape) - len(axes)) + tuple(axes)


def over_mesh(
    f: Callable,
    in_axes: Sequence[Sequence[str | None] | None],
    out_axes: Sequence,
    cut: Sequence[str] = MESH_AXES,
) -> Callable:
    """`f` run on each device's part of its arguments: the only way to call an opaque kernel.

    Args:
      in_axes: for each argument its logical axes, or None for an argument that is None.
      out_axes: `(axes, shape)` of the result, or a tuple of such pairs.
      cut: the mesh axes over which the arguments are cut; `f` sees the mesh of the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f

    def spec_of(axes, shape):
        return P() if axes is None else RULES.spec(axes, shape, mesh)

    def cut_of(spec):
        names = lambda entry: entry if isinstance(entry, tuple) else (entry,)
        return P(*(tuple(n for n in names(entry) if n in cut) or None for entry in spec))

    def call(*args):
        specs = [
            None if x is None else spec_of(axes, jnp.shape(x))
            for x, axes in zip(args, in_axes, strict=True)
        ]
        placed = [x if x is None else jax.reshard(x, s) for x, s in zip(args, specs, strict=True)]
        ins = tuple(s if s is None else cut_of(s) for s in specs)
        single = isinstance(out_axes[0][0], str | None)
        outs = [cut_of(spec_of(*pair)) for pair in ([out_axes] if single else out_axes)]
        how = dict(axis_names=set(cut), check_vma=False)
        whole = jax.shard_map(f, in_specs=ins, out_specs=outs[0] if single else tuple(outs), **how)
        return whole(*placed)

    return call


def ways(axis: str, size: int | None = None) -> int:
    """Over how many devices the mesh that is set lays a logical axis; 1 without a mesh.

    Given its size, 1 too where they do not divide it, for then it is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty else RULES.mesh_axes(axis, mesh)
    count = math.prod(mesh.shape[n] for n in names)
    return 1 if size is not None and size % count else count


def context_axis(length: int) -> str | None:
    """The mesh axis over which rows of this length are split; None where they are whole."""
    spec = current_spec(("length",), (length,))
    return None if spec is None else spec[0]
