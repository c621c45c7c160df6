"""What each letter of a stack costs: parameters, FLOPs, bytes, what it sends; no compilation.

A letter is traced as a block of its own at the length asked for, so a mixer that nobody thought of
here is billed too. Only work that hides in loops over data has a formula (`_HIDDEN`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hybridjax.aot.flops import count
from hybridjax.config import ModelConfig
from hybridjax.mixers.attention import Attention
from hybridjax.mixers.base import Context
from hybridjax.models.block import Block
from hybridjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Item:
    """One letter, or the embedding with the head, once.

    Attributes:
      flops: forward, per token of a row of the length asked for, mean over the row.
      hidden_flops: the part of `flops` that comes from a formula.
      decode_flops: to write the token after that length.
      weight_bytes: as stored; a decoding step reads them once for all its rows.
      state_per_token, state_constant: bytes of the decoding state of one row.
      gathered_bytes: of weights in the compute dtype that an fsdp axis gathers in a forward pass.
      reduced_bytes: of outputs per token that a tensor axis adds up in a forward pass.
    """

    name: str
    parameters: int
    flops: float
    hidden_flops: float
    decode_flops: float
    weight_bytes: int
    state_per_token: float
    state_constant: float
    gathered_bytes: int
    reduced_bytes: int
    unknown: tuple[str, ...] = ()  # mixers with hidden work and no formula


@dataclasses.dataclass(frozen=True)
class Bill:
    """The letters' items in the order of the stack's first use, and how often each occurs."""

    length: int
    items: tuple[tuple[Item, int], ...]

    def total(self, field: str) -> float:
        return sum(getattr(item, field) * times for item, times in self.items)

    def json(self) -> list[dict]:
        return [dataclasses.asdict(item) | {"times": times} for item, times in self.items]

    def state_bytes(self, length: int) -> float:
        return self.total("state_per_token") * length + self.total("state_constant")


def bill(config: ModelConfig, length: int) -> Bill:
    """The bill of a stack for rows of `length` tokens."""
    key = jax.random.key(0)
    items, ctx = {}, None
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    ctx = jax.eval_shape(Context.of_rows, tokens)
    h = jax.ShapeDtypeStruct((1, length, config.width), jnp.dtype(config.dtype))
    for letter in config.layers:
        if letter in items:
            continue
        new = lambda letter=letter: Block(
            config.blocks[letter], config.width, key, depth=1, norm_eps=config.norm_eps
        )
        block = jax.eval_shape(new)
        items[letter] = _letter(letter, block, h, ctx)
        _, ctx = jax.eval_shape(lambda b, h, c: b(h, c), block, h, ctx)  # with what it publishes
    ends = _ends(config)
    counted = [(item, config.layers.count(letter)) for letter, item in items.items()]
    return Bill(length, (*counted, (ends, 1)))


def _letter(letter: str, block: Block, h, ctx: Context) -> Item:
    length, dtype = h.shape[1], h.dtype
    forward = count(jax.make_jaxpr(lambda b, h, c: b(h, c)[0])(block, h, ctx))
    hidden = sum(_hidden(mixer, length) for mixer in block.mixers) if forward.hidden else 0.0
    unknown = [type(m).__name__ for m in block.mixers if not _formula(m)] if forward.hidden else []

    state, twice = (
        jax.eval_shape(lambda n=n: block.init_state(1, n, dtype)) for n in (length, 2 * length)
    )
    per_token = (_bytes(twice) - _bytes(state)) / length
    one = jax.ShapeDtypeStruct((1, 1, h.shape[2]), dtype)
    last = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    step = dataclasses.replace(ctx, positions=last, segments=last)
    extend = lambda block, h, state, ctx: block.extend(h, state, ctx)[:2]
    decode = count(jax.make_jaxpr(extend)(block, one, state, step))

    return Item(
        name=letter,
        parameters=_parameters(block),
        flops=forward.counted / length + hidden,
        hidden_flops=hidden,
        decode_flops=decode.counted,
        weight_bytes=_bytes(block),
        state_per_token=per_token,
        state_constant=_bytes(state) - per_token * length,
        gathered_bytes=_sum(block, lambda a, x: x.size * dtype.itemsize if "embed" in a else 0),
        reduced_bytes=_sum(block, lambda a, x: x.shape[1] * dtype.itemsize if _contracts(a) else 0),
        unknown=tuple(unknown),
    )


def _ends(config: ModelConfig) -> Item:
    """The embedding, the last norm and the head: whatever of the decoder is not a block."""
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    h = jax.ShapeDtypeStruct((1, 1, config.width), jnp.dtype(config.dtype))
    flops = count(jax.make_jaxpr(lambda m, h: m.logits(h))(model, h)).counted
    parts = [model.embedding, model.norm] + ([] if model.head is None else [model.head])
    size = jnp.dtype(config.dtype).itemsize
    read = model.embedding if model.head is None else model.head
    return Item(
        name="ends",
        parameters=sum(map(_parameters, parts)),
        flops=flops,
        hidden_flops=0.0,
        decode_flops=flops,
        weight_bytes=_bytes(read),  # of the table decoding reads a row, of the head all
        state_per_token=0.0,
        state_constant=0.0,
        gathered_bytes=size * sum(x.size for x in jax.tree.leaves(parts) if x.ndim == 2),
        reduced_bytes=0,
    )


# ---------------------------------------------------------------- work that loops over data hide


def visible_keys(length: int, window: int | None = None) -> float:
    """How many keys a query of a causal row sees, its own included; mean over the row."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def _attention(mixer: Attention, length: int) -> float:
    """`q k^T` and `p v`: 2 products of H K numbers per query and visible key."""
    return 4.0 * mixer.heads * mixer.head_dim * visible_keys(length, mixer.window)


_HIDDEN: dict[type, Callable[[nnx.Module, int], float]] = {Attention: _attention}


def _formula(mixer: nnx.Module) -> Callable | None:
    return next((f for cls, f in _HIDDEN.items() if isinstance(mixer, cls)), None)


def _hidden(mixer: nnx.Module, length: int) -> float:
    formula = _formula(mixer)
    return formula(mixer, length) if formula else 0.0


# ---------------------------------------------------------------- parameters and their axes


def _contracts(axes: tuple[str | None, ...]) -> bool:
    """Whether a kernel multiplies over an axis that a tensor axis cuts."""
    return len(axes) == 2 and axes[0] in ("heads", "mlp")


def _sum(module: nnx.Module, f: Callable) -> int:
    is_parameter = lambda leaf: isinstance(leaf, nnx.Param)
    leaves = jax.tree.leaves(module, is_leaf=is_parameter)
    return sum(f(leaf.get_metadata()["axes"], leaf) for leaf in leaves)


def _parameters(module) -> int:
    return sum(x.size for x in jax.tree.leaves(module))


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
