"""Sources -> shuffled, sharded, packed, mixed and batched: the loader of a run."""

import sys

import grain
from grain import experimental

from hybridjax.config import DataConfig, UserError
from hybridjax.data.packing import pack
from hybridjax.data.sources import Source, build_source
from hybridjax.data.tokenizer import load_tokenizer

PREFETCH = 4  # batches made ahead, in a thread


def make_loader(
    data: DataConfig,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    align: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless, deterministic iterator of batches {tokens, targets, ...} [batch_size, seq_len].

    Sources are packed each by itself and mixed by rows, so a source's weight is its share of the
    positions. `get_state()` is plain JSON and resumes exactly.

    Args:
      batch_size: rows of this process.
      split: "train", "tune" or "heldout".
      align: documents start at multiples of this (the stack's alignment).
      process_index, process_count: this process gets its own part of every source.
    """
    if not data.sources:
        raise UserError("config.data.sources is empty: name at least one source")
    tokenizer = load_tokenizer(data.tokenizer)
    shard = slice(process_index, None, process_count)
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
    batches = mixed.batch(batch_size, drop_remainder=True)
    return iter(experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))


def _endless(source: Source, name: str, shard: slice, seed: int) -> grain.IterDataset:
    documents = source.dataset(shard)
    if isinstance(documents, grain.IterDataset):
        return experimental.RepeatIterDataset(documents)
    if len(documents) == 0:
        raise UserError(
            f"config.data.sources.{name} has no document for process {shard.start} of "
            f"{shard.step}: add documents or use fewer processes"
        )
    if len(documents) < sys.maxsize:
        documents = documents.shuffle(seed % 2**32).repeat()
    # Reading threads would only compete with each other for the interpreter: the loader has one.
    return documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
