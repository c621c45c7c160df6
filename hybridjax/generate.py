"""Talks with a run: `python -m hybridjax.generate --workdir=runs/hypenet-tiny --prompt="#q30; ?q"`.

The prompt is read in pieces of one fixed size, so any length needs one compilation and bounded
memory; then tokens come one by one. `--save_state` keeps what the model has read, and
`--load_state` continues it: many questions (`--prompt=A --prompt=B`) of one long prefix.
"""

import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import flags
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from hybridjax import command
from hybridjax.config import UserError
from hybridjax.layers.position import MAX_POSITION
from hybridjax.models.decoder import Decoder, DecoderState
from hybridjax.workdir import open_run

PIECE = 512  # tokens of a prompt that are read at once
Prefix = tuple[DecoderState, Float[Array, "B vocab"]]  # what was read, and the next token's logits


def main() -> None:
    given = flags.FLAGS
    if given.workdir is None:
        raise UserError("no model: give --workdir=runs/NAME")
    run = open_run(given.workdir)
    model, tokenizer = run.model, run.tokenizer
    prompts = [*given.prompt, *(pathlib.Path(p).read_text() for p in given.prompt_file)]
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if not rows or any(len(row) == 0 for row in rows):
        raise UserError("no prompt: give --prompt=TEXT or --prompt_file=PATH, not empty")
    longest = max(map(len, rows))
    max_length = given.max_length or longest + given.tokens
    base = None if run.logit_base is None else jnp.float32(run.logit_base)

    if given.load_state:
        state, _ = load_prefix(given.load_state, model)
        state = fork(state, len(rows))
    else:
        state = new_state(model, len(rows), max_length)
    check_room(state, longest + given.tokens)

    began = time.perf_counter()
    state, logits = jax.block_until_ready(prefill(model, rows, state, logit_base=base))
    read_seconds = time.perf_counter() - began
    if given.save_state:
        save_prefix(given.save_state, (state, logits))
        print(f"read {longest} tokens; state saved to {given.save_state}")

    sampler = functools.partial(
        sample, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p
    )
    began, written = time.perf_counter(), [[] for _ in rows]
    stream = decode(model, (state, logits), jax.random.key(given.seed), sampler, base)
    for _, tokens in zip(range(given.tokens), stream, strict=False):
        for row, token in zip(written, tokens, strict=True):
            if not (row and row[-1] == tokenizer.eos):
                row.append(int(token))
        if len(rows) == 1:
            print(tokenizer.decode(written[0][-1:]), end="", flush=True)
        if all(row[-1] == tokenizer.eos for row in written):
            break
    seconds = time.perf_counter() - began
    if len(rows) > 1:
        for prompt, row in zip(prompts, written, strict=True):
            print(f"> {prompt[-60:]}\n{tokenizer.decode(row)}")
    count = sum(map(len, written))
    print(
        f"\n[read {sum(map(len, rows)) / read_seconds:,.0f} tokens/s, wrote "
        f"{count / max(seconds, 1e-9):,.1f} tokens/s, state {state_bytes(state):,} bytes]"
    )


# ---------------------------------------------------------------- reading


def prefill(
    model: Decoder,
    rows: Sequence[Int[np.ndarray, " n"]],
    state: DecoderState,
    *,
    logit_base: Float[Array, ""] | None = None,
    piece: int = PIECE,
) -> Prefix:
    """Reads prompts of unequal lengths after what the state has seen, `piece` tokens at a time."""
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), -(-longest // piece) * piece), np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    logits = None
    for start in range(0, longest, piece):
        part = slice(start, start + piece)
        new, state = _read(model, tokens[:, part], segments[:, part], state, logit_base)
        # A row that ended in an earlier piece keeps the logits after its own last token.
        ended = jnp.asarray(segments[:, start] == 0)[:, None]
        logits = new if logits is None else jnp.where(ended, logits, new)
    return state, logits


@functools.partial(jax.jit, donate_argnums=3)
def _read(model, tokens, segments, state, logit_base):
    h, state = model.extend(tokens, state, segments, logit_base)
    last = jnp.maximum(jnp.sum(segments, axis=1) - 1, 0)
    h = jnp.take_along_axis(h, last[:, None, None], axis=1)
    return model.logits(h)[:, 0], state


# ---------------------------------------------------------------- writing


def decode(
    model: Decoder, prefix: Prefix, key: jax.Array, sampler, logit_base=None
) -> Iterator[Int[np.ndarray, " B"]]:
    """Tokens after a prefix, one per row at a time, without end. The prefix stays usable."""
    state, logits = jax.tree.map(jnp.copy, prefix)
    for step in range(MAX_POSITION):
        tokens, state, logits = _write(
            model, state, logits, jax.random.fold_in(key, step), logit_base, sampler
        )
        yield np.asarray(tokens)


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def _write(model, state, logits, key, logit_base, sampler):
    tokens = sampler(logits, key)
    h, state = model.extend(tokens[:, None], state, logit_base=logit_base)
    return tokens, state, model.logits(h)[:, 0]


def sample(
    logits: Float[Array, "B vocab"],
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " B"]:
    """One token per row: the likeliest at temperature 0, else drawn from the `top_k` likeliest (0:
    all) among the fewest whose probability reaches `top_p` (arXiv 1904.09751)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        needed = jnp.cumsum(probability, axis=-1) - probability < top_p
        threshold = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.random.categorical(key, logits)


# ---------------------------------------------------------------- states


def new_state(model: Decoder, batch: int, max_length: int) -> DecoderState:
    if max_length > MAX_POSITION:
        raise UserError(f"max_length {max_length} is beyond the last position {MAX_POSITION}")
    return jax.jit(lambda m: m.init_state(batch, max_length))(model)


def check_room(state: DecoderState, tokens: int) -> None:
    """Raises UserError if the state's buffers cannot take so many more tokens."""
    room, seen = state.max_length, int(jnp.max(state.length))
    if seen + tokens > room:
        raise UserError(
            f"{seen + tokens} tokens ({seen} read before) do not fit into a state for {room}: "
            "give a larger --max_length, or a shorter prompt or --tokens"
        )


def fork(state: DecoderState, count: int) -> DecoderState:
    """The state of one prefix as that of `count` rows which go on in different ways."""
    if state.length.shape[0] == count:
        return state
    if state.length.shape[0] != 1:
        raise UserError(f"a state of {state.length.shape[0]} rows cannot be forked to {count}")
    return jax.tree.map(lambda x, axis: jnp.repeat(x, count, axis), state, state.batch_axes())


def state_bytes(state: DecoderState) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def save_prefix(path: str, prefix: Prefix) -> None:
    metadata = {"max_length": str(prefix[0].max_length), "rows": str(prefix[1].shape[0])}
    save_file(_named(prefix), path, metadata)


def load_prefix(path: str, model: Decoder) -> Prefix:
    """Raises UserError for a file that does not hold a state of this model."""
    try:
        with safetensors.safe_open(path, "flax") as file:
            metadata = file.metadata()
        arrays = load_file(path)
        rows, max_length = int(metadata["rows"]), int(metadata["max_length"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a saved state: {error}") from error
    state = jax.eval_shape(lambda: model.init_state(rows, max_length))
    vocab = model.embedding.table.shape[0]
    wanted = (state, jax.ShapeDtypeStruct((rows, vocab), jnp.float32))
    shapes = {name: x.shape for name, x in _named(wanted).items()}
    if shapes != {name: x.shape for name, x in arrays.items()}:
        raise UserError(f"{path} holds the state of another model: read the prompt again")
    return jax.tree.unflatten(jax.tree.structure(wanted), [arrays[name] for name in shapes])


def _named(tree) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run whose newest checkpoint speaks")
    flags.DEFINE_multi_string("prompt", [], "a text to continue; several make a batch")
    flags.DEFINE_multi_string("prompt_file", [], "a file with a text to continue")
    flags.DEFINE_integer("tokens", 128, "tokens to write", lower_bound=1)
    flags.DEFINE_integer("max_length", 0, "room of the state; 0: what prompt and tokens need")
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest; 0: from all", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest with this probability in sum")
    flags.DEFINE_integer("seed", 0, "of the draws")
    flags.DEFINE_string("save_state", None, "keep what was read in this file")
    flags.DEFINE_string("load_state", None, "continue what was read into this file")
    command.run(main)
