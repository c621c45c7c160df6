"""Log-likelihoods of continuations, many requests in one row.

A request of a prefix and a continuation is a document: its inputs are all tokens but the last, its
targets all but the first, of which those of the continuation count. Short requests share a row as
segments, which do not see each other; a longer one has a row of its own, of the next power of two.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.evals.batches import in_batches, traced
from hybridjax.loss import next_token_loss
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder

Request = tuple[Sequence[int], Sequence[int]]  # prefix, of one token at least, and continuation
ROW = 1024  # tokens of a row that short requests share


def log_likelihoods(
    model: Decoder, requests: Sequence[Request], logit_base: float | None = None, row: int = ROW
) -> list[tuple[float, bool]]:
    """For each request the log-probability of the continuation in nats, and whether every token of
    it is the likeliest one."""
    base, results = traced(logit_base), {}
    lengths = [_row_length(request, row, model.align) for request in requests]
    for length in sorted(set(lengths)):
        members = [i for i, own in enumerate(lengths) if own == length]
        rows, places = packed([requests[i] for i in members], length, model.align)
        nats, hits = np.moveaxis(in_batches(lambda rows: _score(model, rows, base), rows), 1, 0)
        for i, (at, tokens) in zip(members, places, strict=True):
            # The sum of a whole document in f32 would lose digits.
            total = -float(nats[at, tokens].sum(dtype=np.float64))
            results[i] = total, bool(hits[at, tokens].all())
    return [results[i] for i in range(len(requests))]


def _row_length(request: Request, row: int, align: int) -> int:
    needed = max(row, 1 << (_size(request) - 1).bit_length())
    return -(-needed // align) * align


def _size(request: Request) -> int:
    return len(request[0]) + len(request[1]) - 1


def packed(
    requests: Sequence[Request], length: int, align: int = 1
) -> tuple[Int[np.ndarray, "n T 4"], list[tuple[int, slice]]]:
    """Rows of (token, target, segment, position); and for each request its row, and the slice of
    the row where the targets are those of the continuation."""
    starts = _starts([math.ceil(_size(request) / align) * align for request in requests], length)
    rows = np.zeros((1 + max(at for at, _ in starts), length, 4), np.int32)
    places = []
    for i, ((at, start), (prefix, continuation)) in enumerate(zip(starts, requests, strict=True)):
        tokens = np.concatenate([prefix, continuation])
        document = rows[at, start : start + len(tokens) - 1]
        document[:, 0], document[:, 1] = tokens[:-1], tokens[1:]
        document[:, 2], document[:, 3] = i + 1, np.arange(len(document))
        places.append((at, slice(start + len(prefix) - 1, start + len(document))))
    return rows, places


def _starts(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """For each size a row and a place in it: the longest first, in the first row with room."""
    room, rows, places = np.full(len(sizes), length), 0, {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = int(np.argmax(room[: rows + 1] >= sizes[i]))
        places[i] = at, int(length - room[at])
        room[at] -= sizes[i]
        rows = max(rows, at + 1)
    return [places[i] for i in range(len(sizes))]


@jax.jit
def _score(
    model: Decoder, rows: Int[Array, "B T 4"], base: Float[Array, ""]
) -> Float[Array, "B 2 T"]:
    """For each token the nats of its target, and whether that is the likeliest."""
    tokens, targets, segments, positions = jnp.moveaxis(rows, -1, 0)
    h = model.hidden(tokens, Context(positions, segments, base))
    _, nats, hits = next_token_loss(model, h, targets, jnp.ones(targets.shape))
    return jnp.stack([nats, hits], axis=1)
