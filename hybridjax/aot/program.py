"""The programs of a run, traced for a mesh of devices that need not exist: arguments are shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybridjax import generate, host_memory
from hybridjax.config import Config, UserError
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import current_spec, ways
from hybridjax.train import make_train_step, new_model, new_state

_BATCH = ("tokens", "targets", "loss_weights", "segments", "positions", "answers")
NAMES = ("train", "prefill", "decode")
ON_HOST = "state on the host"  # the part that takes nothing of a device's memory


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function traced on its arguments, each with its place on the mesh.

    Attributes:
      parts: the arguments by what they are (`parameters`, `optimizer`, `state`, ...).
      tokens: that one call consumes, over all devices.
    """

    name: str
    traced: jax.stages.Traced
    parts: Mapping[str, Any]
    tokens: int
    bodies: int

    def bytes(self) -> dict[str, int]:
        """Bytes of each part on one device, by arithmetic: no padding to the memory's tiles."""
        return {name: sum(map(local_bytes, jax.tree.leaves(t))) for name, t in self.parts.items()}


def trace(
    config: Config, mesh, name: str, *, rows: int = 1, context: int = 0,
    chunks_on_host: bool = False,
) -> Program:  # fmt: skip
    """The train step of a config, or a piece of reading or one step of writing with `rows` rows.

    `context`: the tokens that the decoding state has room for. `chunks_on_host`: where it keeps
    keys and values of a memory of chunks.
    """
    with jax.set_mesh(mesh):
        if name == "train":
            return train_program(config, mesh)
        model = placed(jax.eval_shape(lambda: new_model(config)), mesh)
        new = jax.jit(lambda m: m.init_state(rows, context, chunks_on_host))
        state = placed(new.lower(model).out_info, mesh)  # unlike eval_shape it knows the host
        if name == "prefill":
            return _prefill(model, state, mesh, rows, min(generate.PIECE, context))
        return _decode(model, state, mesh, rows)


def train_program(config: Config, mesh) -> Program:
    """The train step, on the mesh that is set."""
    batch = batch_of(config, mesh)
    optimizer = make_optimizer(
        config.optimizer, config.steps, jax.eval_shape(lambda: new_model(config))
    )
    state = placed(jax.eval_shape(lambda: new_state(config, optimizer)), mesh)
    traced = make_train_step(optimizer, config).trace(state, batch)
    arguments = {"parameters": state.model, "optimizer": state.opt_state, "batch": batch}
    tokens = config.batch_size * config.seq_len
    return Program("train", traced, arguments, tokens, bodies(state.model))


def batch_of(config: Config, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Raises `UserError` for a batch that does not divide over the mesh."""
    parts = config.accumulate * ways("batch")
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by accumulate x devices along the "
            f"batch = {parts}: use a multiple of that, or a smaller data or fsdp axis"
        )
    shape = (config.batch_size, config.seq_len)
    place = NamedSharding(mesh, current_spec(("batch", "length"), shape))
    kind = lambda name: jnp.float32 if name == "loss_weights" else jnp.int32
    return {name: jax.ShapeDtypeStruct(shape, kind(name), sharding=place) for name in _BATCH}


def _prefill(model, state, mesh, rows: int, piece: int) -> Program:
    tokens = _anywhere((rows, piece), jnp.int32, mesh)
    traced = generate.read_piece.trace(model, tokens, tokens, state, None)
    parts = {"parameters": model, **_by_memory(state)}
    return Program("prefill", traced, parts, rows * piece, len(model.layers))


def _decode(model, state, mesh, rows: int) -> Program:
    logits = jax.ShapeDtypeStruct(
        (rows, model.embedding.table.shape[0]), jnp.float32,
        sharding=NamedSharding(mesh, current_spec(("batch", None), (rows, 1))),
    )  # fmt: skip
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
    greedy = lambda logits, key: jnp.argmax(logits, axis=-1)
    traced = generate.write_token.trace(model, state, logits, key, None, greedy)
    parts = {"parameters": model, **_by_memory(state), "logits": logits}
    return Program("decode", traced, parts, rows, len(model.layers))


def _by_memory(state) -> dict[str, list[jax.ShapeDtypeStruct]]:
    leaves = jax.tree.leaves(state)
    on_host = [x for x in leaves if host_memory.is_on_host(x)]
    device = [x for x in leaves if not host_memory.is_on_host(x)]
    return {"state": device, ON_HOST: on_host} if on_host else {"state": device}


def bodies(model) -> int:
    """Blocks that are compiled: the letters of each pattern, repeats where they are unrolled."""
    repeats = [1 if model.scan else group.repeats for group in model.plan]
    return sum(len(g.pattern) * n for g, n in zip(model.plan, repeats, strict=True))


def placed(tree: Any, mesh) -> Any:
    """Shapes that carry their places on the mesh's devices, as arguments of a program need."""

    def place(x):
        spec = P() if x.sharding is None else x.sharding.spec
        kind = host_memory.KIND if host_memory.is_on_host(x) else None
        sharding = NamedSharding(mesh, spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def local_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    size = 1
    for n in shape:
        size *= n
    return size * x.dtype.itemsize


def _anywhere(shape: tuple[int, ...], dtype, mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
