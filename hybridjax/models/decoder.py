"""The decoder: an embedding, a stack of blocks described by a string, and an output head.

Everything that runs over the stack is one primitive, `Decoder.fold`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridjax.config import ModelConfig, UserError
from hybridjax.layers.embedding import Embedding, head_logits
from hybridjax.layers.norm import RMSNorm
from hybridjax.mixers.base import Context, batch_axes, new_length
from hybridjax.mixers.chunk_memory import ChunkState
from hybridjax.models.block import Block
from hybridjax.models.plan import Group, plan
from hybridjax.sharding import place

DTYPES = ("float32", "bfloat16")
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("mixer", "mlp"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """One value per letter of the stack, laid out as the stack is: per group, per letter of its
    pattern, a tree whose arrays lead with the group's repeats."""

    groups: tuple[tuple[Any, ...], ...]

    def stack(self) -> Any:
        """The values along one leading axis, in layer order, where all have the same shapes."""
        rows = []
        for group in self.groups:
            repeats = len(jax.tree.leaves(group)[0])
            rows += [jax.tree.map(lambda x, r=r: x[r], v) for r in range(repeats) for v in group]
        return jax.tree.map(lambda *x: jnp.stack(x), *rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """What decoding carries: a value, so it can be kept, copied and continued in several ways."""

    layers: tuple[tuple[Any, ...], ...]  # per letter of the stack, of each of its block's mixers
    length: Int[Array, " B"]
    max_length: int = dataclasses.field(metadata={"static": True})

    def batch_axes(self) -> "DecoderState":
        """For each array the index of its batch axis."""
        layers = tuple(tuple(map(batch_axes, states)) for states in self.layers)
        return DecoderState(layers, 0, self.max_length)


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array):
        """Raises `UserError` for a stack that cannot be planned or a legend without sense."""
        for name, known in (("remat", REMAT), ("dtype", DTYPES)):
            if getattr(config, name) not in known:
                value = getattr(config, name)
                raise UserError(f"{name} is {value!r}: use one of {', '.join(known)}")
        new_block = lambda letter, key, depth=1: Block(
            config.blocks[letter], config.width, key, depth=depth, norm_eps=config.norm_eps
        )
        legend = {
            letter: jax.eval_shape(lambda letter=letter: new_block(letter, key)).letter
            for letter in config.blocks
        }
        self.layers, self.plan = config.layers, plan(config.layers, legend)
        self.counted = tuple(i for i, c in enumerate(config.layers) if legend[c].counted)
        self.dtype, self.remat, self.scan = config.dtype, config.remat, config.scan

        embedding_key, head_key, layers_key = jax.random.split(key, 3)
        new_layer = lambda letter, index: new_block(
            letter, jax.random.fold_in(layers_key, index), len(self.counted)
        )
        self.embedding = Embedding(
            config.vocab, config.width, embedding_key, std=config.embedding_std
        )
        self.groups = nnx.List(
            [nnx.List([_stacked(new_layer, g, j) for j in range(len(g.pattern))])
             for g in self.plan]
        )  # fmt: skip
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        kernel = jax.random.normal(head_key, (config.width, config.vocab)) * config.width**-0.5
        self.head = None if config.tied else nnx.Param(kernel, axes=("embed", "vocab"))

    # ------------------------------------------------------------ training and evaluation

    def __call__(
        self, tokens: Int[Array, "B T"], ctx: Context | None = None, data: Any = None
    ) -> Float[Array, "B T vocab"]:
        """Next-token logits in f32; `ctx=None`: each row is one document."""
        return self.logits(self.hidden(tokens, ctx, data))

    def hidden(
        self, tokens: Int[Array, "B T"], ctx: Context | None = None, data: Any = None
    ) -> Float[Array, "B T D"]:
        """The stream after the last block, normalised: what the head reads.

        `data`: per-layer data for the blocks (a `choice`'s selector, a traced window), `[L, ...]`.
        """
        ctx = Context.of_rows(tokens) if ctx is None else ctx
        h = self.embedding(tokens, jnp.dtype(self.dtype))
        extra = () if data is None else (data,)
        h, _ = self.fold(_apply, h, ctx, *extra)
        return self.norm(h)

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        return head_logits(h, self.head_kernel())

    def head_kernel(self) -> Float[Array, "D vocab"]:
        return self.embedding.table[...].T if self.head is None else self.head[...]

    # ------------------------------------------------------------ decoding

    def init_state(
        self, batch: int, max_length: int, chunks_on_host: bool = False
    ) -> DecoderState:
        """The state before the first token, with room for `max_length` tokens per row.

        `chunks_on_host`: keys and values of a memory of chunks in the host's memory.
        """
        dtype = jnp.dtype(self.dtype)
        layers = tuple(b.init_state(batch, max_length, dtype) for b in self._letters())
        if chunks_on_host:
            move = lambda s: s.with_chunks_on_host() if isinstance(s, ChunkState) else s
            layers = tuple(tuple(map(move, states)) for states in layers)
        return DecoderState(layers, place(jnp.zeros(batch, jnp.int32), "batch"), max_length)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        state: DecoderState,
        segments: Int[Array, "B T"] | None = None,
        logit_base: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], DecoderState]:
        """Consumes tokens after those that the state has seen: prefill in pieces, and decoding.

        `segments`: 1 for tokens, 0 for padding at the right; None: all are tokens.
        Returns what `logits` reads, and the new state.
        """
        h, state = self._consume(tokens, state, segments, logit_base, len(self.layers))
        return self.norm(h), state

    def remember(
        self,
        tokens: Int[Array, "B T"],
        state: DecoderState,
        segments: Int[Array, "B T"] | None = None,
        logit_base: Float[Array, ""] | None = None,
    ) -> DecoderState:
        """Consumes tokens of which at least `tail` follow before any output is wanted.

        Only the layers that must read every token run. What the others keep is wrong until `tail`
        more tokens have been extended; then all is as if these had been extended too.
        """
        return self._consume(tokens, state, segments, logit_base, self.memory_depth)[1]

    @property
    def memory_depth(self) -> int:
        """How many letters, from the bottom, must read every token of a prefix: those up to the
        last layer that looks back without bound, such as a chunk encoder at mid-depth."""
        unbounded = [i for i, reach in enumerate(self._reaches()) if reach is None]
        return unbounded[-1] + 1 if unbounded else 0

    @property
    def tail(self) -> int:
        """How many tokens before its own an output depends on through the letters above."""
        return sum(self._reaches()[self.memory_depth :])

    def _reaches(self) -> list[int | None]:
        """Per letter how far back it looks; None: without bound."""
        groups = zip(self.plan, self.groups, strict=True)
        return [reach for g, blocks in groups for reach in [b.reach for b in blocks] * g.repeats]

    def _consume(self, tokens, state: DecoderState, segments, logit_base, depth: int):
        """Runs the first `depth` letters; the others only count the tokens."""
        positions = state.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        segments = jnp.ones_like(tokens) if segments is None else segments
        positions, segments = (place(x, "batch", "length") for x in (positions, segments))
        ctx = Context(positions, segments, logit_base)
        h, layers = self.embedding(tokens, jnp.dtype(self.dtype)), []
        # Not a fold: a scan would copy every cache out of its stack and back for each token.
        for index, block in enumerate(self._letters()):
            states = state.layers[index]
            if index < depth:
                h, states, ctx = block.extend(h, states, ctx)
            else:
                states = tuple(_counted(s, ctx) for s in states)
            layers.append(states)
        return h, dataclasses.replace(
            state, layers=tuple(layers), length=new_length(state.length, ctx)
        )

    # ------------------------------------------------------------ the stack

    def fold(
        self, f: Callable, h: Float[Array, "B T D"], ctx: Context, *per_layer: Any
    ) -> tuple[Float[Array, "B T D"], PerLayer]:
        """Folds `f(block, h, ctx, *extra) -> (h, ctx, out)` over the blocks, first to last.

        The context that `f` returns carries what the block published to the blocks above.
        Repeated groups are scanned, each block under the model's remat policy.

        Args:
          per_layer: trees whose arrays lead with one entry per letter of the stack, or `PerLayer`;
            `f` gets each layer's part as `extra`.
        Returns:
          the last h, and every `out`.
        """
        rest = [self._by_group(values) for values in per_layer]
        call = f
        if self.remat != "none":
            call = jax.checkpoint(lambda *args: f(*args), policy=REMAT[self.remat])

        outs = []
        for group, blocks, *extras in zip(self.plan, self.groups, *rest, strict=True):

            def repeat(h, ctx, blocks, extras):
                out = []
                for block, *extra in zip(blocks, *extras, strict=True):
                    h, ctx, o = call(block, h, ctx, *extra)
                    out.append(o)
                return h, ctx, tuple(out)

            xs = tuple(blocks), extras
            if self.scan and group.repeats > 1:

                def body(h, x, ctx=ctx):
                    h, _, out = repeat(h, ctx, *x)  # what it publishes ends here
                    return h, out

                h, out = jax.lax.scan(body, h, xs)
            else:
                each = []
                for r in range(group.repeats):
                    h, ctx, out = repeat(h, ctx, *_at(xs, r))
                    each.append(out)
                out = jax.tree.map(lambda *x: jnp.stack(x), *each)
            outs.append(out)
        return h, PerLayer(tuple(outs))

    def layer(self, index: int) -> Block:
        """The index-th layer that adds to the stream, as a block of its own (a copy)."""
        letter = self.counted[index]
        stack = zip(self.plan, self.groups, strict=True)
        group, blocks = next((g, b) for g, b in stack if letter < g.stop)
        repeat, position = divmod(letter - group.start, len(group.pattern))
        return _at(blocks[position], repeat)

    @property
    def align(self) -> int:
        """Documents of a packed row start at multiples of this many tokens."""
        return max(block.align for blocks in self.groups for block in blocks)

    def _letters(self) -> Iterator[Block]:
        """The blocks, one per letter of the stack."""
        for group, blocks in zip(self.plan, self.groups, strict=True):
            for r in range(group.repeats):
                yield from (_at(block, r) for block in blocks)

    def _by_group(self, values: Any) -> tuple[tuple[Any, ...], ...]:
        if isinstance(values, PerLayer):
            return values.groups
        return tuple(
            tuple(
                jax.tree.map(lambda x, g=g, j=j: x[g.start + j : g.stop : len(g.pattern)], values)
                for j in range(len(g.pattern))
            )
            for g in self.plan
        )


def _counted(state: Any, ctx: Context) -> Any:
    """A mixer's state that has seen nothing of the tokens, and knows that they were there."""
    return dataclasses.replace(state, length=new_length(state.length, ctx))


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _apply(block: Block, h, ctx, *data):
    h, ctx = block(h, ctx, *data)
    return h, ctx, None


def _stacked(new_layer: Callable, group: Group, position: int) -> Block:
    """The blocks at one position of a group's pattern, stacked over its repeats."""
    indices = group.start + position + len(group.pattern) * jnp.arange(group.repeats)
    return jax.vmap(lambda index: new_layer(group.pattern[position], index))(indices)
