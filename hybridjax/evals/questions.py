"""Many questions of one prefix, however long: it is read once, and its memory is not copied."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.mixers.chunk_memory import ChunkState
from hybridjax.models.decoder import Decoder, DecoderState


@functools.partial(jax.jit, donate_argnums=1)
def ask(
    model: Decoder,
    state: DecoderState,
    questions: Int[Array, "n T"],
    logit_base: Float[Array, ""] | None = None,
) -> tuple[DecoderState, Int[Array, "n T"]]:
    """The likeliest token after each token of each question, all asked of the same prefix.

    Args:
      state: of one row. It is used up, and given back as it was.
    """

    def one(state, question):
        h, after = model.extend(question[None], state, logit_base=logit_base)
        return _rewound(after, state), jnp.argmax(model.logits(h)[0], axis=-1)

    return jax.lax.scan(one, state, questions)


def write_answers(
    model: Decoder,
    state: DecoderState,
    questions: Int[Array, "n T"],
    tokens: int,
    logit_base: Float[Array, ""] | None = None,
) -> tuple[DecoderState, Int[Array, "n tokens"]]:
    """So many tokens after each question, each the likeliest after those before it.

    Every token asks again with what was written so far, so that nothing but `ask` holds the memory.

    Args:
      state: as of `ask`.
    """
    for _ in range(tokens):
        state, likeliest = ask(model, state, questions, logit_base)
        questions = jnp.concatenate([questions, likeliest[:, -1:]], axis=1)
    return state, questions[:, -tokens:]


def _rewound(after: DecoderState, before: DecoderState) -> DecoderState:
    """The state before, in the buffers of the one after where they are large."""

    def of_mixer(after: Any, before: Any) -> Any:
        return after.rewound(before) if isinstance(after, ChunkState) else before

    pairs = zip(after.layers, before.layers, strict=True)
    layers = tuple(tuple(map(of_mixer, *pair)) for pair in pairs)
    return dataclasses.replace(before, layers=layers)
