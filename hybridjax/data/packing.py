"""Documents to rows of T positions, without a target that crosses documents.

A document of n tokens gives n - 1 positions: inputs `tokens[:-1]`, targets `tokens[1:]`. Then its
end is padded to a multiple of `align`, so that every document starts on the chunk grid of the
stack. What is cut off at the end of a row goes on in the next one as a segment of its own, with
positions from 0: a row never sees another row's tokens. No target is lost by a cut.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from hybridjax.config import UserError
from hybridjax.data.sources import Document

Row = dict[str, np.ndarray]
# The columns of a document travel as one array of records; padding is all zeros.
COLUMNS = np.dtype(
    [("tokens", "i4"), ("targets", "i4"), ("loss_weights", "f4"), ("answers", "i4"), ("real", "?")]
)
BINS = 64  # rows that best-fit packing fills at a time
BIN_POSITIONS = 2**22  # but not more positions than this


def pack(
    documents: grain.IterDataset, length: int, *, packing: str = "concat", align: int = 1
) -> grain.IterDataset:
    """Rows {tokens, targets, loss_weights, segments, positions, answers}, each of `length`.

    Args:
      packing: "concat" fills every row, cutting documents; "best_fit" leaves documents whole (but
        for those longer than a row) and rows partly empty.
      align: every document starts at a multiple of this.
    """
    if packing not in PACKINGS:
        raise UserError(f"unknown packing {packing!r}: there are {', '.join(PACKINGS)}")
    if length % align:
        raise UserError(
            f"seq_len {length} is not a multiple of {align}, the chunk grid of the stack: use "
            f"{max(1, round(length / align)) * align}"
        )
    columns = documents.map(lambda document: _columns(document, align))
    return PACKINGS[packing](columns, length)


def _columns(document: Document, align: int) -> np.ndarray:
    n = len(document["tokens"]) - 1
    columns = np.zeros(-(-n // align) * align, COLUMNS)
    columns["tokens"][:n] = document["tokens"][:-1]
    columns["real"][:n] = True
    for target, name in (("targets", "tokens"), ("loss_weights",) * 2, ("answers",) * 2):
        columns[target][:n] = document[name][1:]
    return columns


def _row(columns: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> Row:
    real = columns["real"]
    segments = np.where(real, segments, 0).astype(np.int32)
    row = {name: columns[name].copy() for name in COLUMNS.names if name != "real"}
    row["segments"] = segments
    row["positions"] = np.where(real, positions, 0).astype(np.int32)
    row["answers"] = _renumber(row["answers"], segments)
    return row


def _renumber(answers: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Answers numbered within their documents -> within the row."""
    if not answers.any():
        return answers
    starts = answers > 0
    starts[1:] &= (answers[1:] != answers[:-1]) | (segments[1:] != segments[:-1])
    return np.where(answers > 0, np.cumsum(starts, dtype=np.int32), 0)


# ---------------------------------------------------------------- concat


class _ConcatThenSplit(grain.IterDataset):
    """Documents end to end, cut into rows.

    Not `grain.experimental.ConcatThenSplitIterDataset`: its state holds tuples, and resumed from a
    checkpoint, where they are JSON lists, it loses a document (Grain 0.2.18).
    """

    def __init__(self, columns: grain.IterDataset, length: int):
        super().__init__(columns)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _ConcatThenSplitIterator(iter(self._parent), self._length)


class _ConcatThenSplitIterator(grain.DatasetIterator):
    """Its state: the parent's state before the current document, and the place in that."""

    def __init__(self, parent: grain.DatasetIterator, length: int):
        super().__init__(parent)
        self._length = length
        self._before = parent.get_state()
        self._document: np.ndarray | None = None
        self._offset = 0

    def __next__(self) -> Row:
        pieces, room = [], self._length
        while room:
            try:
                self._advance()
            except StopIteration:
                if not pieces:
                    raise
                break
            piece = self._document[self._offset : self._offset + room]
            pieces.append(piece)
            self._offset += len(piece)
            room -= len(piece)
        return _row(*_join(pieces, self._length))

    def _advance(self) -> None:
        while self._document is None or self._offset == len(self._document):
            self._before, self._offset, self._document = self._parent.get_state(), 0, None
            self._document = next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before, self._offset, self._document = state["parent"], state["offset"], None
        if self._offset:
            self._document = next(self._parent)


def _join(pieces: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    columns = np.zeros(length, COLUMNS)
    segments, positions = np.zeros((2, length), np.int32)
    start = 0
    for segment, piece in enumerate(pieces, 1):
        stop = start + len(piece)
        columns[start:stop] = piece
        segments[start:stop] = segment
        positions[start:stop] = np.arange(len(piece))
        start = stop
    return columns, segments, positions


# ---------------------------------------------------------------- best fit


class _Cut(experimental.FlatMapTransform):
    """Cuts what is longer than a row."""

    max_fan_out = 2**31

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, columns: np.ndarray) -> list[dict[str, np.ndarray]]:
        starts = range(0, len(columns), self._length)
        return [{"row": columns[start : start + self._length]} for start in starts]


def _best_fit(columns: grain.IterDataset, length: int) -> grain.IterDataset:
    rows = experimental.BestFitPackIterDataset(
        experimental.FlatMapIterDataset(columns, _Cut(length)),
        length_struct={"row": length},
        num_packing_bins=max(1, min(BINS, BIN_POSITIONS // length)),
    )
    return rows.map(lambda x: _row(x["row"], x["row_segment_ids"], x["row_positions"]))


PACKINGS = {"concat": _ConcatThenSplit, "best_fit": _best_fit}
