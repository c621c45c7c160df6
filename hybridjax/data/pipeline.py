"""Sources -> shuffled, packed, mixed and batched: the loader of a run.

A batch is made of `streams`: each packs its own part of every source, and gives its own rows of
every batch. Which process reads a stream does not matter, so the order of rows does not depend on
the number of processes. One stream may be read by many processes, each of which then does all the
work of packing it and keeps its own rows: give a run on many hosts as many streams as hosts.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath
from grain import experimental
from jaxtyping import Num

from hybridjax.config import DataConfig, UserError
from hybridjax.data.packing import pack
from hybridjax.data.sources import Source, build_source
from hybridjax.data.tokenizer import load_tokenizer

PREFETCH = 4  # batches made ahead, in a thread


class Loader:
    """An endless, deterministic iterator of batches {tokens, targets, ...} [rows, seq_len].

    `rows` says which rows of the whole batch they are. `get_state()` is plain JSON and resumes
    exactly; Orbax calls `save` and `load`.
    """

    def __init__(self, streams: dict[int, grain.DatasetIterator], rows: range, owned: set[int]):
        """`owned`: the streams whose state this process saves."""
        self._streams, self.rows, self._owned = streams, rows, owned

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, Num[np.ndarray, "rows seq_len"]]:
        parts = [next(stream) for stream in self._streams.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {str(stream): iterator.get_state() for stream, iterator in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for stream, iterator in self._streams.items():
            iterator.set_state(state[str(stream)])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    async def save(self, directory) -> Awaitable[None]:
        state = {s: json.dumps(self._streams[s].get_state(), indent=1) for s in sorted(self._owned)}

        async def write() -> None:
            path = await directory.await_creation()
            for stream, text in state.items():
                await asyncio.to_thread(_file(path, stream).write_text, text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        async def read() -> None:
            for stream, iterator in self._streams.items():
                text = await asyncio.to_thread(_file(directory, stream).read_text)
                iterator.set_state(json.loads(text))

        return read()


def _file(directory, stream: int) -> epath.Path:
    return epath.Path(directory) / f"stream_{stream}.json"


def make_loader(
    data: DataConfig,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    align: int = 1,
    needed: Sequence[range] | None = None,
    process: int = 0,
) -> Loader:
    """The loader of one process.

    Sources are packed each by itself and mixed by rows, so a source's weight is its share of the
    positions.

    Args:
      batch_size: rows of the whole batch.
      split: "train", "tune" or "heldout".
      align: documents start at multiples of this (the stack's alignment).
      needed: for each process the rows of the batch that its devices hold; by default this one
        holds all.
      process: which of them this is.
    """
    if not data.sources:
        raise UserError("config.data.sources is empty: name at least one source")
    if data.streams < 1 or batch_size % data.streams:
        raise UserError(
            f"config.data.streams is {data.streams}: it must divide batch_size {batch_size}"
        )
    size = batch_size // data.streams
    readers = [
        range(rows.start // size, -(-rows.stop // size)) for rows in needed or [range(batch_size)]
    ]
    mine = readers[process]
    owned = {stream for stream in mine if not any(stream in r for r in readers[:process])}
    options = dict(seq_len=seq_len, split=split, seed=seed)
    streams = {stream: _stream(data, stream, size, align, **options) for stream in mine}
    return Loader(streams, range(mine.start * size, mine.stop * size), owned)


def _stream(
    data: DataConfig, stream: int, size: int, align: int, *, seq_len: int, split: str, seed: int
) -> grain.DatasetIterator:
    """Batches of `size` rows from every `data.streams`-th document of each source."""
    tokenizer = load_tokenizer(data.tokenizer)
    shard = slice(stream, None, data.streams)
    rows, weights = [], []
    for name, spec in sorted(data.sources.items()):
        weight = spec.get("weight", 1.0)
        if weight < 0:
            raise UserError(f"config.data.sources.{name}.weight is {weight}: it must be >= 0")
        if weight == 0:
            continue
        source = build_source(spec, tokenizer, seq_len=seq_len, split=split, seed=seed)
        documents = _endless(source, name, shard, seed)
        rows.append(pack(documents, seq_len, packing=data.packing, align=align))
        weights.append(weight)
    if not rows:
        raise UserError("every weight in config.data.sources is 0: give one source a weight")
    mixed = grain.IterDataset.mix(rows, weights) if len(rows) > 1 else rows[0]
    batches = mixed.batch(size, drop_remainder=True)
    return iter(experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))


def _endless(source: Source, name: str, shard: slice, seed: int) -> grain.IterDataset:
    documents = source.dataset(shard)
    if isinstance(documents, grain.IterDataset):
        return experimental.RepeatIterDataset(documents)
    if len(documents) == 0:
        raise UserError(
            f"config.data.sources.{name} has no document for stream {shard.start} of "
            f"{shard.step}: add documents or lower config.data.streams"
        )
    if len(documents) < sys.maxsize:
        documents = documents.shuffle(seed % 2**32).repeat()
    # Reading threads would only compete with each other for the interpreter: the loader has one.
    return documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
