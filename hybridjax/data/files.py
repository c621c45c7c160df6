"""Documents from files: text, Parquet, ArrayRecord, or token ids.

Every source numbers its documents. With `heldout=0.01`, of each hundred in a row the first is held
out, the second is for `tune` and the others are for training, so each split has a document as soon
as there are three.
"""

import bisect
import functools
import importlib
import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from etils import epath
from grain import experimental

from hybridjax.config import UserError
from hybridjax.data.sources import Document, encode, text_document
from hybridjax.data.tokenizer import Tokenizer

SCAN = 2**25  # token ids looked at in one piece


class Text:
    """Text files, read into memory: a document is a file, or a part of one between separators.

    In a `.jsonl` file a document is the field `column` of a line.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        path: str,
        separator: str | None = None,
        column: str = "text",
        heldout: float = 0.01,
        loss_weight: float = 1.0,
    ):
        texts = [t for f in _files(path) for t in _texts(f, separator, column) if t.strip()]
        numbers = SplitNumbers(len(texts), split, heldout, path)
        self._texts = [texts[number] for number in numbers]
        self._document = functools.partial(_document, tokenizer, loss_weight=loss_weight)

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset:
        return grain.MapDataset.source(self._texts)[shard].map(self._document)


class ArrayRecord:
    """ArrayRecord files of UTF-8 text, a document per record (best written with group_size:1)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        path: str,
        heldout: float = 0.01,
        loss_weight: float = 1.0,
    ):
        _need("array_record", "ArrayRecord files")
        try:
            self._records = grain.sources.ArrayRecordDataSource(_files(path))
            count = len(self._records)
        except Exception as error:  # the library raises what its C++ part reports
            raise UserError(f"{path} is not readable ArrayRecord: {_line(error)}") from error
        self._numbers = SplitNumbers(count, split, heldout, path)
        self._document = functools.partial(_document, tokenizer, loss_weight=loss_weight)

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset:
        numbers = grain.MapDataset.source(self._numbers)[shard]
        return numbers.map(lambda n: self._document(self._records[n].decode(errors="replace")))


class Parquet:
    """A text column of Parquet files, a document per row.

    Row groups are read in random order, and shuffled, but not mixed with each other. Streams
    share out the row groups, or the rows if there are too few groups.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        path: str,
        column: str = "text",
        heldout: float = 0.01,
        loss_weight: float = 1.0,
    ):
        _need("pyarrow", "Parquet files")
        self._groups, rows = [], 0  # (file, row group, number of its first row)
        for file in _files(path):
            metadata = _open_parquet(file, column).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group, rows))
                rows += metadata.row_group(group).num_rows
        self._numbers = SplitNumbers(rows, split, heldout, path)
        self._path, self._column, self._seed = path, column, seed
        self._document = functools.partial(_document, tokenizer, loss_weight=loss_weight)

    def dataset(self, shard: slice = slice(None)) -> grain.IterDataset:
        start, stop, step = shard.indices(len(self._numbers))
        if start >= stop:
            raise UserError(
                f"{self._path} has {stop} documents, too few for {step} streams: add documents or "
                "lower config.data.streams"
            )
        groups = grain.MapDataset.source(self._groups)
        if len(groups) >= step:
            groups, start, step = groups[shard], 0, 1
        groups = groups.shuffle(self._seed % 2**32).repeat()
        groups = groups.map(lambda group: self._read(*group, start, step))
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        texts = experimental.FlatMapIterDataset(groups.to_iter_dataset(ahead), _Rows())
        return texts.map(self._document)

    def _read(self, file: str, index: int, first: int, start: int, step: int) -> list[str]:
        """The texts of a row group that are in the split and the shard, shuffled."""
        parquet = _open_parquet(file, self._column)
        try:
            column = parquet.read_row_group(index, columns=[self._column]).column(0).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}, row group {index}, is corrupt: {_line(error)}") from error
        texts = []
        for number, text in enumerate(column, first):
            rank = self._numbers.rank(number)
            if text and rank is not None and rank % step == start:
                texts.append(text)
        random.Random(f"{self._seed} {file} {index}").shuffle(texts)
        return texts


class Tokens:
    """Memory-mapped files of token ids (`.bin`), documents ended by the tokenizer's eos."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        split: str,
        seed: int,
        *,
        path: str,
        dtype: str = "uint16",
        heldout: float = 0.01,
        loss_weight: float = 1.0,
    ):
        if dtype not in ("uint16", "uint32"):
            raise UserError(f"token files of {dtype} are not read: use uint16 or uint32")
        self._files, self._ends = [], []
        for file in _files(path):
            if (size := epath.Path(file).stat().length) % np.dtype(dtype).itemsize or not size:
                raise UserError(f"{file} has {size} bytes, which is no array of {dtype}")
            self._files.append(np.memmap(file, dtype, "r"))
            self._ends.append(_ends(self._files[-1], tokenizer, file))
        self._firsts = [0, *itertools.accumulate(len(ends) for ends in self._ends)]
        self._numbers = SplitNumbers(self._firsts[-1], split, heldout, path)
        self._loss_weight = loss_weight

    def dataset(self, shard: slice = slice(None)) -> grain.MapDataset:
        return grain.MapDataset.source(self._numbers)[shard].map(self._read)

    def _read(self, number: int) -> Document:
        file = bisect.bisect_right(self._firsts, number) - 1
        ends, index = self._ends[file], number - self._firsts[file]
        start = ends[index - 1] if index else 0
        return text_document(self._files[file][start : ends[index]], loss_weight=self._loss_weight)


class SplitNumbers:
    """The numbers of the documents of one split, of `count` documents."""

    def __init__(self, count: int, split: str, heldout: float, path: str):
        if not 0 < heldout <= 1 / 3:
            raise UserError(f"heldout is {heldout}: it must be above 0 and at most 1/3")
        period = round(1 / heldout)
        self._place = {"heldout": range(1), "tune": range(1, 2), "train": range(2, period)}[split]
        self._period = period
        rounds, rest = divmod(count, period)
        self._length = rounds * len(self._place) + sum(place < rest for place in self._place)
        if not self._length:
            raise UserError(
                f"{path} has {count} documents, none for the split {split!r}: there must be at "
                "least 3"
            )

    def rank(self, number: int) -> int | None:
        """Which of the split's documents the document `number` is; None if it is in another."""
        rounds, place = divmod(number, self._period)
        if place not in self._place:
            return None
        return rounds * len(self._place) + self._place.index(place)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(index)
        rounds, place = divmod(index, len(self._place))
        return rounds * self._period + self._place[place]


class _Rows(experimental.FlatMapTransform):
    """A row group's texts one by one."""

    max_fan_out = 2**31

    def flat_map(self, texts: list[str]) -> list[str]:
        return texts


def _document(tokenizer: Tokenizer, text: str, *, loss_weight: float) -> Document:
    return text_document(encode(tokenizer, text), loss_weight=loss_weight)


def _files(path: str) -> list[str]:
    """The files that a path or a glob names, local or in a bucket."""
    parts = epath.Path(path).parts
    wild = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if wild is None:
        found = [epath.Path(path)] if epath.Path(path).is_file() else []
    else:
        found = epath.Path(*parts[:wild]).glob("/".join(parts[wild:]))
    files = sorted(str(file) for file in found)
    if not files:
        raise UserError(f"no file at {path}: give the path of a file, or a glob such as data/*.txt")
    return files


def _texts(file: str, separator: str | None, column: str) -> Sequence[str]:
    try:
        text = epath.Path(file).read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    if not file.endswith(".jsonl"):
        return text.split(separator) if separator else [text]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_field(file, number, line, column) for number, line in lines]


def _field(file: str, number: int, line: str, column: str) -> str:
    try:
        return json.loads(line)[column]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}, line {number}, is no JSON object with the field {column!r}"
        ) from error


def _open_parquet(file: str, column: str) -> Any:
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{file} is not a readable Parquet file: {_line(error)}") from error
    if column not in parquet.schema_arrow.names:
        names = ", ".join(parquet.schema_arrow.names)
        raise UserError(f"{file} has no column {column!r}: set `column` to one of {names}")
    return parquet


def _ends(ids: np.ndarray, tokenizer: Tokenizer, file: str) -> np.ndarray:
    """Where each document ends, its eos included; checks every id."""
    ends = []
    for start in range(0, len(ids), SCAN):
        piece = ids[start : start + SCAN]
        if (largest := int(piece.max())) >= tokenizer.vocab:
            raise UserError(
                f"{file} has the token id {largest}, but the tokenizer {tokenizer.name} has "
                f"{tokenizer.vocab} ids: set config.data.tokenizer to the one that made the file"
            )
        ends.append(start + 1 + np.flatnonzero(piece == tokenizer.eos))
    ends = np.concatenate(ends)
    if not len(ends) or ends[-1] != len(ids):
        ends = np.append(ends, len(ids))
    return ends


def _need(module: str, what: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} need {module}: pip install 'hybridjax[data]'") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
