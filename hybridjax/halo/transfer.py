"""The teacher's weights in the student (arXiv 2601.22156, section 3 and eq. 13).

Linear mixers inherit the projections of queries, keys, values and outputs and the norms of queries
and keys; everything else of them is new. Where they have more K/V heads than the teacher, each of
the teacher's is repeated, interleaved: head i gets K/V head i // group.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hybridjax.config import ModelConfig, UserError, build
from hybridjax.halo.config import HaloConfig, choice_config, student_config
from hybridjax.layers.qkv import GatedOutput
from hybridjax.mixers import MIXERS
from hybridjax.mixers.attention import Attention
from hybridjax.mixers.base import Mixer
from hybridjax.models.block import Block
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import place, place_parameters

INHERITED = ("query", "key", "value", "query_norm", "key_norm")


def linear_mixers(halo: HaloConfig, teacher: Decoder) -> Mixer:
    """A linear mixer for each of the teacher's layers, stacked, with what it inherits."""
    attention = only_block(teacher).mixers[0]
    width, depth = teacher.norm.scale.shape[0], len(teacher.layers)
    keys = jax.random.split(jax.random.key(halo.seed), depth)
    mixers = jax.vmap(lambda key: build(halo.linear, MIXERS, width, key))(keys)
    return place_parameters(_open(halo, inherit(mixers, attention)))


def student(
    halo: HaloConfig, config: ModelConfig, layers: str, teacher: Decoder, mixers: Mixer
) -> Decoder:
    """The hybrid `layers`: the teacher, with its attention or a linear mixer in each layer.

    `config` is the teacher's. Attention that stays is the teacher's with the changes of
    `halo.attention`; a gate is new.
    """
    keep = lambda new, old: _preserve(halo, inherit(new, old))
    return _assemble(student_config(halo, config, layers), teacher, mixers, keep, halo.seed)


def swapped(
    halo: HaloConfig, config: ModelConfig, layers: str, teacher: Decoder, mixers: Mixer
) -> Decoder:
    """The teacher with linear mixers in the layers `L`, and its own attention in the others."""
    unchanged = dataclasses.replace(halo, attention={})
    return _assemble(student_config(unchanged, config, layers), teacher, mixers, lambda _, old: old)


def _assemble(
    config: ModelConfig,
    teacher: Decoder,
    mixers: Mixer,
    keep: Callable[[Mixer, Attention], Mixer],
    seed: int = 0,
) -> Decoder:
    """`keep`: makes of a layer's new attention and the teacher's the one that stays."""
    model, source = Decoder(config, jax.random.key(seed)), only_block(teacher)
    for group, blocks in zip(model.plan, model.groups, strict=True):
        for position, letter in enumerate(group.pattern):
            rows = slice(group.start + position, group.stop, len(group.pattern))
            block, old = blocks[position], _rows(source, rows)
            if letter == "L":
                block.mixers[0] = _rows(mixers, rows)
            else:
                block.mixers[0] = keep(block.mixers[0], old.mixers[0])
            _take_rest(block, old)
    return place_parameters(_take_ends(model, teacher))


def choices(halo: HaloConfig, config: ModelConfig, teacher: Decoder, mixers: Mixer) -> Decoder:
    """The teacher with a choice in every layer: 0 is its own attention, 1 the linear mixer."""
    model = Decoder(choice_config(halo, config), jax.random.key(0))
    block, source = only_block(model), only_block(teacher)
    block.mixers[0].options = nnx.List([source.mixers[0], mixers])
    _take_rest(block, source)
    return place_parameters(_take_ends(model, teacher))


def only_block(model: Decoder) -> Block:
    """The block of a stack of one letter, its layers stacked."""
    [[block]] = model.groups
    return block


def inherit(mixer: Mixer, attention: Attention) -> Mixer:
    """The mixer with the attention's projections and norms; both may be stacked layers."""
    target, source = getattr(mixer, "qkv", mixer), attention.qkv
    if not all(hasattr(target, name) for name in INHERITED[:3]) or not hasattr(mixer, "output"):
        raise UserError(
            f"{type(mixer).__name__} has no query, key, value and output that could be inherited"
        )
    for name in INHERITED:
        new, old = getattr(target, name, None), getattr(source, name)
        if new is not None and old is not None:
            take = lambda into, x, name=name: _expand(x, into.shape[-1], source.head_dim, name)
            setattr(target, name, jax.tree.map(take, new, old))
    kernel = attention.output.kernel[...]
    if mixer.output.kernel.shape != kernel.shape:
        raise _misfit("output", kernel.shape, mixer.output.kernel.shape)
    mixer.output.kernel = mixer.output.kernel.replace(kernel)
    return mixer


def _expand(x: jax.Array, size: int, head_dim: int, name: str) -> jax.Array:
    """Each head of the last axis, repeated until there are `size` columns."""
    repeats, rest = divmod(size, x.shape[-1])
    if rest or not repeats:
        raise _misfit(name, x.shape, (*x.shape[:-1], size))
    if repeats == 1:
        return x
    whole = place(x, *(None,) * x.ndim)  # heads are repeated across the devices that hold them
    heads = whole.reshape(*x.shape[:-1], -1, head_dim)
    return jnp.repeat(heads, repeats, axis=-2).reshape(*x.shape[:-1], size)


def _misfit(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> UserError:
    return UserError(
        f"the teacher's {name} projection is {tuple(there)} and the student's {tuple(here)}: give "
        "config.linear the heads and head_dim of the teacher"
    )


# ---------------------------------------------------------------- gates


def _open(halo: HaloConfig, mixer: Mixer) -> Mixer:
    """The mixer with its output gate, where it has one, at 1/2 for every input."""
    if halo.gates == "preserving" and isinstance(mixer.output, GatedOutput) and mixer.output.gate:
        kernel = mixer.output.gate.kernel
        mixer.output.gate.kernel = kernel.replace(jnp.zeros_like(kernel[...]))
    return mixer


def _preserve(halo: HaloConfig, attention: Attention) -> Attention:
    """Attention whose new gate changes nothing: 1/2 everywhere, and the output doubled."""
    if halo.gates == "preserving" and attention.output.gate is not None:
        kernel = attention.output.kernel
        attention.output.kernel = kernel.replace(2 * kernel[...])
    return _open(halo, attention)


# ---------------------------------------------------------------- what is the same


def _rows(stacked, rows: slice):
    return jax.tree.map(lambda x: x[rows], stacked)


def _take_rest(block: Block, source: Block) -> None:
    block.norms, block.output_norms, block.mlp = source.norms, source.output_norms, source.mlp


def _take_ends(model: Decoder, teacher: Decoder) -> Decoder:
    model.embedding, model.norm, model.head = teacher.embedding, teacher.norm, teacher.head
    return model
