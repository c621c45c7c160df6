"""Between the tensors of a family and the parameters of a decoder, both ways.

A family's table speaks of layer i; a decoder stacks the layers that it scans. `_layout` knows where
layer i lives.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from hybridjax.config import ModelConfig, UserError
from hybridjax.huggingface.family import TOP, Family
from hybridjax.huggingface.tensors import DTYPES, Tensors
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import current_spec, named_sharding, parameter_axes

DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # tables that old checkpoints hold


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer of a parameter: these rows of a tensor."""

    name: str
    rows: slice
    shape: tuple[int, ...]  # of these rows, as stored
    transposed: bool

    def of(self, tensor: np.ndarray) -> np.ndarray:
        rows = tensor[self.rows]
        return rows.T if self.transposed else rows


def load(config: ModelConfig, family: Family, tensors: Mapping[str, np.ndarray]) -> Decoder:
    """The decoder whose parameters are these tensors, in f32, each where the mesh wants it.

    Every device reads its own ranges. Besides the parameters, one tensor at most is in memory.

    Raises:
      UserError: lists every tensor that is missing, has another shape or dtype, or has no place.
    """
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    layout = _layout(config, family, model)
    _check(_shapes(layout), tensors, config.tied)

    def fill(path: str, parameter: nnx.Param) -> nnx.Param:
        axes, parts = parameter_axes(parameter), layout[path]
        if not _stacked(path):
            return parameter.replace(_settled(_read(tensors, parts[0], axes)))
        shape = parameter.shape
        value = jnp.zeros(shape, jnp.float32, device=_sharding(axes, shape))
        for index, part in enumerate(parts):
            layer = _read(tensors, part, axes[1:])
            value = jax.block_until_ready(_put(value, layer, index))
        return parameter.replace(value)

    return _map_parameters(fill, model)


def tensors_of(
    config: ModelConfig, family: Family, model: Decoder
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the family's tensors, one after the other, in f32 and on the host."""
    layout, parameters = _layout(config, family, model), dict(_parameters(model))
    sources: dict[str, list[tuple[Part, str, int]]] = {name: [] for name in _shapes(layout)}
    for path, parts in layout.items():
        for index, part in enumerate(parts):
            sources[part.name].append((part, path, index))
    for name, found in sources.items():
        rows = []
        for part, path, index in sorted(found, key=lambda source: source[0].rows.start):
            value = parameters[path][...]
            value = _host(value[index] if _stacked(path) else value)
            rows.append(value.T if part.transposed else value)
        yield name, np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])


def shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors in a family."""
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    return _shapes(_layout(config, family, model))


# ---------------------------------------------------------------- where layer i lives


def _layout(config: ModelConfig, family: Family, model: Decoder) -> dict[str, list[Part]]:
    """For each parameter's path the parts of its layers; of one layer, if it is not stacked."""
    shapes = {path: parameter.shape for path, parameter in _parameters(model)}
    top = {path: name for name, path in TOP.items()}
    layout = {}
    for path, shape in shapes.items():
        transposed = path.endswith("/kernel") or path == "head"
        if not _stacked(path):
            stored = shape[::-1] if transposed else shape
            layout[path] = [Part(top[path], slice(0, stored[0]), stored, transposed)]
            continue
        _, g, j, of_block = path.split("/", 3)
        group, j = model.plan[int(g)], int(j)
        kind = config.blocks[group.pattern[j]].mixers[0]["type"]
        name, before = _row(family, kind, of_block)
        block = path.removesuffix(of_block)
        start = sum(shapes[block + other][-1] for other in before)
        stored = shape[:0:-1] if transposed else shape[1:]
        letters = range(group.start + j, group.stop, len(group.pattern))
        layout[path] = [
            Part(
                f"model.layers.{model.counted.index(letter)}.{name}",
                slice(start, start + stored[0]),
                stored,
                transposed,
            )
            for letter in letters
        ]
    return layout


def _row(family: Family, kind: str, of_block: str) -> tuple[str, tuple[str, ...]]:
    """The tensor that holds a parameter of a block, and the parameters before it in there."""
    for name, paths in family.layers[kind].items():
        paths = (paths,) if isinstance(paths, str) else paths
        if of_block in paths:
            return name, paths[: paths.index(of_block)]
    raise UserError(f"{family.architecture} has no tensor for {of_block} of a {kind} layer")


def _shapes(layout: Mapping[str, list[Part]]) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes, layer by layer."""
    found: dict[str, tuple[int, ...]] = {}
    for part in (part for parts in layout.values() for part in parts):
        rows = max(part.rows.stop, found.get(part.name, (0,))[0])
        found[part.name] = (rows, *part.shape[1:])
    number = lambda name: int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    return {name: found[name] for name in sorted(found, key=number)}


def _stacked(path: str) -> bool:
    return path.startswith("groups/")


def _parameters(model: Decoder) -> Iterator[tuple[str, nnx.Param]]:
    for path, leaf in jax.tree.leaves_with_path(model, is_leaf=_is_parameter):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _map_parameters(f, model: Decoder) -> Decoder:
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree.map_with_path(lambda path, x: f(name(path), x), model, is_leaf=_is_parameter)


def _is_parameter(leaf) -> bool:
    return isinstance(leaf, nnx.Param)


# ---------------------------------------------------------------- what a directory must hold


def _check(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], tied: bool
) -> None:
    faults = []
    for name in wanted:
        if name not in tensors:
            faults.append(f"{name} is missing")
            continue
        dtype, shape = _kind(tensors, name)
        if shape != wanted[name]:
            faults.append(f"{name} is {list(shape)}, not {list(wanted[name])}")
        if dtype not in DTYPES:
            faults.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
    copies = {"lm_head.weight"} if tied else set()
    extra = [n for n in tensors if n not in wanted and n not in copies and not DERIVED.search(n)]
    faults += [f"{name} has no place" for name in extra]
    if faults:
        count = f"{len(faults)} tensors do" if len(faults) > 1 else "a tensor does"
        raise UserError(f"{count} not fit the configuration: {'; '.join(faults)}")
    if tied and "lm_head.weight" in tensors:
        if not _same(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise UserError(
                "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight: "
                "set tie_word_embeddings to false in config.json"
            )


def _kind(tensors: Mapping[str, np.ndarray], name: str) -> tuple[str, tuple[int, ...]]:
    """dtype, in the words of safetensors, and shape, without reading."""
    if isinstance(tensors, Tensors):
        return tensors.places[name].dtype, tensors.places[name].shape
    words = {dtype: word for word, dtype in DTYPES.items()}
    return words.get(tensors[name].dtype, str(tensors[name].dtype)), tensors[name].shape


def _same(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    if a.shape != b.shape:
        return False
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


# ---------------------------------------------------------------- to devices and back


def _read(tensors: Mapping[str, np.ndarray], part: Part, axes: tuple[str | None, ...]) -> Array:
    """A layer of a parameter in its stored dtype, of which each device reads what it holds."""
    view = part.of(tensors[part.name])
    sharding = _sharding(axes, view.shape)
    return jax.make_array_from_callback(view.shape, sharding, lambda index: view[index])


def _sharding(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
    if current_spec(axes, shape) is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return named_sharding(axes, shape)


@jax.jit
def _settled(x: Array) -> Array:
    """In f32, and in memory of its own: on a CPU an array may be a view of the file."""
    return jnp.copy(x.astype(jnp.float32))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Array, layer: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)


def _host(x: Array) -> np.ndarray:
    return multihost_utils.process_allgather(x, tiled=True)
