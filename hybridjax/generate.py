"""Talks with a run: `python -m hybridjax.generate --workdir=runs/hypenet-tiny --prompt="#q30; ?q"`.

The prompt is read in pieces of one fixed size, so any length needs one compilation and bounded
memory; then tokens come one by one. `--save_state` keeps what the model has read, and
`--load_state` continues it: alone, or with many questions of one long prefix
(`--prompt=A --prompt=B`).
"""

import contextlib
import functools
import itertools
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from hybridjax import command, host_memory
from hybridjax.config import UserError
from hybridjax.data.tokenizer import TextStream
from hybridjax.files import one_line, reason
from hybridjax.layers.position import MAX_POSITION
from hybridjax.models.decoder import Decoder, DecoderState
from hybridjax.sharding import current_spec, place
from hybridjax.workdir import open_run

PIECE = 512  # tokens of a prompt that are read at once
Prefix = tuple[DecoderState, Float[Array, "B vocab"]]  # what was read, and the next token's logits


def main() -> None:
    given = flags.FLAGS
    if given.workdir is None:
        raise UserError("no model: give --workdir=runs/NAME")
    run = open_run(given.workdir)
    model, tokenizer = run.model, run.tokenizer
    prompts = [*given.prompt, *map(_text_of, given.prompt_file)]
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if any(len(row) == 0 for row in rows) or not (rows or given.load_state):
        raise UserError("no prompt: give --prompt=TEXT or --prompt_file=PATH, not empty")
    longest = max(map(len, rows), default=0)
    base = None if run.logit_base is None else jnp.float32(run.logit_base)

    # ------------------------------------------------------------ read
    if given.load_state:
        prefix = fork(load_prefix(given.load_state, model), len(rows) or None)
        check_room(prefix[0], longest + given.tokens)
    else:
        need = longest + given.tokens
        room = given.max_length or -(-need // PIECE) * PIECE  # few sizes: compiled programs serve
        check_length(need, room)
        prefix = new_state(model, len(rows), room, given.chunks == "host"), None
    began = time.perf_counter()
    if rows:
        prefix = jax.block_until_ready(prefill(model, rows, prefix[0], logit_base=base))
    seconds = time.perf_counter() - began
    read = sum(map(len, rows))
    speed = f"{seconds:.1f} s ({read / max(seconds, 1e-9):,.0f} tokens/s, compilation included)"
    notes = [f"read {read:,} tokens in {speed}"] if rows else []
    if given.save_state:
        save_prefix(given.save_state, prefix)
        notes.append(f"state saved to {given.save_state}")

    notes.append(sizes(prefix[0]))

    # ------------------------------------------------------------ write
    sampler = functools.partial(
        sample, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p
    )
    steps = decode(model, prefix, jax.random.key(given.seed), sampler, base)
    written: list[list[int]] = [[] for _ in range(prefix[1].shape[0])]
    text = TextStream(tokenizer)
    for count, tokens in enumerate(itertools.islice(steps, given.tokens)):
        if count == 0:
            began = time.perf_counter()  # the first step, which compiles, is over
        for row, token in zip(written, map(int, tokens), strict=True):
            if not (row and row[-1] == tokenizer.eos):
                row.append(token)
        if all(row[-1] == tokenizer.eos for row in written):
            break
        if len(written) == 1:
            print(text.push(tokens), end="", flush=True)
    rate = count * len(written) / (time.perf_counter() - began)
    if len(written) == 1:
        print(text.flush())
    else:
        for i, row in enumerate(written):
            title = prompts[i][-60:] if prompts else f"row {i}"
            print(f"> {title}\n{tokenizer.decode([t for t in row if t != tokenizer.eos])}")
    notes += [f"wrote {rate:,.1f} tokens/s"] if count else []
    print(f"[{', '.join(notes)}]")


def _text_of(path: str) -> str:
    with one_line(f"cannot read the prompt {path}: ", "give a file of UTF-8 text"):
        return pathlib.Path(path).read_text(encoding="utf-8")


# ---------------------------------------------------------------- reading


def prefill(
    model: Decoder,
    rows: Sequence[Int[np.ndarray, " n"]],
    state: DecoderState,
    *,
    logit_base: Float[Array, ""] | None = None,
    piece: int = PIECE,
) -> Prefix:
    """Reads prompts of unequal lengths after what the state has seen, `piece` tokens at a time.

    Where the upper layers look back a bounded way only, they read the ends of the prompts alone.
    The state is used up: copy one that is to be continued in several ways.
    """
    logits = None
    for start, size, matters in _pieces([len(row) for row in rows], piece, model):
        tokens, segments = _whole_piece(rows, start, size)
        if not matters:
            state = remember_piece(model, tokens, segments, state, logit_base)
            continue
        new, state = read_piece(model, tokens, segments, state, logit_base)
        # A row that ended in an earlier piece keeps the logits after its own last token.
        ended = jnp.asarray(segments[:, 0] == 0)[:, None]
        logits = new if logits is None else jnp.where(ended, logits, new)
    return state, logits


def _whole_piece(
    rows: Sequence[Int[np.ndarray, " n"]], start: int, size: int
) -> tuple[Int[np.ndarray, "B size"], Int[np.ndarray, "B size"]]:
    """Tokens from `start` on and their segments, filled up with padding."""
    tokens = np.zeros((len(rows), size), np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        part = row[start : start + size]
        tokens[i, : len(part)], segments[i, : len(part)] = part, 1
    return tokens, segments


def _pieces(ends: Sequence[int], piece: int, model: Decoder) -> Iterator[tuple[int, int, bool]]:
    """Start and size of each piece, and whether its outputs matter: to the end of a row, or to
    what comes after it. The sizes are two at most: `piece`, and one that just exceeds the tail."""
    skips = model.memory_depth < len(model.layers)
    small = min(piece, 1 << model.tail.bit_length()) if skips else piece
    start = 0
    while start < max(ends):
        needed = min(end for end in ends if end > start) - 1 - model.tail
        skipped = [size for size in (piece, small) if skips and start + size <= needed]
        size = skipped[0] if skipped else small
        yield start, size, not skipped
        start += size


@functools.partial(jax.jit, donate_argnums=3)
def read_piece(model, tokens, segments, state, logit_base):
    tokens, segments = place(tokens, "batch", None), place(segments, "batch", None)
    h, state = model.extend(tokens, state, segments, logit_base)
    last = jnp.arange(tokens.shape[1]) == jnp.sum(segments, axis=1, keepdims=True) - 1
    h = jnp.sum(h, axis=1, keepdims=True, where=last[..., None])
    return _logits(model, h), state


@functools.partial(jax.jit, donate_argnums=3)
def remember_piece(model, tokens, segments, state, logit_base):
    tokens, segments = place(tokens, "batch", None), place(segments, "batch", None)
    return model.remember(tokens, state, segments, logit_base)


def _logits(model: Decoder, h: Float[Array, "B 1 D"]) -> Float[Array, "B vocab"]:
    return place(model.logits(h)[:, 0], "batch", None)


# ---------------------------------------------------------------- writing


def decode(
    model: Decoder, prefix: Prefix, key: jax.Array, sampler, logit_base=None
) -> Iterator[Int[np.ndarray, " B"]]:
    """Tokens after a prefix, one per row at a time, without end. The prefix is used up: copy one
    that is to be continued in several ways."""
    state, logits = prefix
    for step in range(MAX_POSITION):
        tokens, state, logits = write_token(
            model, state, logits, jax.random.fold_in(key, step), logit_base, sampler
        )
        yield multihost_utils.process_allgather(tokens, tiled=True)


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def write_token(model, state, logits, key, logit_base, sampler):
    tokens = sampler(logits, key)
    h, state = model.extend(tokens[:, None], state, logit_base=logit_base)
    return tokens, state, _logits(model, h)


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
        threshold = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        needed = jnp.cumsum(probability, axis=-1) - probability < top_p
        threshold = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.random.categorical(key, logits)


# ---------------------------------------------------------------- states


def new_state(
    model: Decoder, batch: int, max_length: int, chunks_on_host: bool = False
) -> DecoderState:
    """Raises UserError for a length beyond all positions, or beyond the host's memory."""
    if max_length > MAX_POSITION:
        raise UserError(f"max_length {max_length} is beyond the last position {MAX_POSITION}")
    make = jax.jit(lambda m: m.init_state(batch, max_length, chunks_on_host))
    leaves = make.trace(model).jaxpr.out_avals  # unlike eval_shape's they know their memory
    if jax.default_backend() != "cpu":
        leaves = [x for x in leaves if x.memory_space == host_memory.HOST]
    needed = state_bytes(leaves)
    free = host_memory.free_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"a state for {batch} x {max_length} tokens needs {needed:,} bytes of host memory and "
            f"{free:,} are free: give a smaller --max_length, fewer rows, or more memory"
        )
    return make(model)


def check_room(state: DecoderState, tokens: int) -> None:
    """Raises UserError if the state's buffers cannot take so many more tokens."""
    check_length(tokens, state.max_length, seen=int(jnp.max(state.length)))


def check_length(tokens: int, room: int, seen: int = 0) -> None:
    if seen + tokens > room:
        before = f" ({seen} read before)" if seen else ""
        raise UserError(
            f"{seen + tokens} tokens{before} do not fit into a state for {room}: give a larger "
            "--max_length when the prompt is read, or a shorter prompt or fewer --tokens"
        )


def fork(prefix: Prefix, count: int | None) -> Prefix:
    """One prefix as that of `count` rows which go on in different ways; None: as it is."""
    state, logits = prefix
    if count in (None, logits.shape[0]):
        return prefix
    if logits.shape[0] != 1:
        raise UserError(
            f"the saved state has {logits.shape[0]} rows and there are {count} prompts: give as "
            "many prompts, or save the state of one"
        )
    rows = current_spec(("batch",), (count,))

    def repeat(x, axis):
        if host_memory.is_on_host(x):
            return host_memory.repeat(x, count)
        x = jnp.repeat(x, count, axis)
        if rows is None:
            return x
        spec = list(jax.typeof(x).sharding.spec)  # one row was whole, many are split
        spec[axis] = rows[0]
        return jax.reshard(x, P(*spec))

    return jax.tree.map(repeat, prefix, (state.batch_axes(), 0))


def state_bytes(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def host_bytes(state: Any) -> int:
    """Those of them that are in the host's memory and not on the device."""
    return state_bytes([x for x in jax.tree.leaves(state) if host_memory.is_on_host(x)])


def sizes(state: DecoderState) -> str:
    """The state's bytes, on the host also for each token, and the process's peak memory so far."""
    on_host = host_bytes(state)
    per_token = on_host / (state.length.size * state.max_length)
    host = f", {on_host:,} of them on the host ({per_token:,.0f} per token)" if on_host else ""
    return f"state {state_bytes(state):,} bytes{host}, peak memory {peak_memory() / 2**30:.2f} GiB"


def peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_prefix(path: str, prefix: Prefix) -> None:
    metadata = {"max_length": str(prefix[0].max_length), "rows": str(prefix[1].shape[0])}
    metadata["chunks"] = "host" if host_bytes(prefix) else "device"
    whole = multihost_utils.process_allgather(_named(prefix), tiled=True)
    if jax.process_index() != 0:
        return
    with _errors_of(f"cannot write the state {path}", "choose another --save_state"):
        save_file(whole, path, metadata)


def load_prefix(path: str, model: Decoder) -> Prefix:
    """Raises UserError for a file that does not hold a state of this model."""
    with _errors_of(f"{path} is not a saved state", "give a file that --save_state wrote"):
        with safetensors.safe_open(path, "flax") as file:
            metadata = file.metadata()
        arrays = load_file(path)
        rows, max_length = int(metadata["rows"]), int(metadata["max_length"])
        chunks_on_host = metadata.get("chunks") == "host"

    def blank(model: Decoder) -> Prefix:
        logits = jnp.zeros((rows, model.embedding.table.shape[0]), jnp.float32)
        state = model.init_state(rows, max_length, chunks_on_host)
        return state, place(logits, "batch", None)

    wanted = jax.jit(blank).lower(model).out_info  # unlike eval_shape it knows the devices
    kinds = lambda named: {name: (x.shape, x.dtype) for name, x in named.items()}
    if kinds(_named(wanted)) != kinds(arrays):
        raise UserError(
            f"{path} holds the state of another model: save it again, with the model of --workdir"
        )
    leaves = [_like(x, arrays[name]) for name, x in _named(wanted).items()]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _like(wanted: jax.ShapeDtypeStruct, x: Array) -> Array:
    """`x` on the mesh that is set, of which `wanted` knows only the axes."""
    mesh, spec = jax.sharding.get_mesh(), wanted.sharding.spec if wanted.sharding else P()
    x = x if mesh.empty else jax.device_put(x, jax.NamedSharding(mesh, spec))
    return jax.jit(host_memory.to_host)(x) if host_memory.is_on_host(wanted) else x


@contextlib.contextmanager
def _errors_of(fault: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{fault} ({reason(error)}): {advice}") from error


def _named(tree) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run whose newest checkpoint speaks")
    flags.DEFINE_multi_string("prompt", [], "a text to continue; several make a batch")
    flags.DEFINE_multi_string("prompt_file", [], "a file with a text to continue")
    flags.DEFINE_integer("tokens", 128, "tokens to write", lower_bound=1)
    flags.DEFINE_integer("max_length", 0, "room of the state; 0: what prompt and tokens need")
    flags.DEFINE_enum(
        "chunks", "device", ("device", "host"), "where a memory of chunks keeps keys and values"
    )
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest; 0: from all", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest of this sum", 1e-6, 1.0)
    flags.DEFINE_integer("seed", 0, "of the draws")
    flags.DEFINE_string("save_state", None, "keep what was read in this file")
    flags.DEFINE_string("load_state", None, "continue what was read into this file")
    command.run(main)
