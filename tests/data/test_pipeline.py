import asyncio
import json

import grain
import numpy as np
import pytest

from hybridjax.config import DataConfig, UserError
from hybridjax.data.pipeline import make_loader
from hybridjax.data.sources import build_source, source, text_document
from hybridjax.data.tokenizer import ByteTokenizer

FIELDS = {"tokens", "targets", "loss_weights", "segments", "positions", "answers"}


class Counting:
    """A small `MapDataset` (or `IterDataset`) source: document i is full of the number i."""

    def __init__(self, tokenizer, seq_len, split, seed, *, base=100, count=10, lazy=False):
        self.documents = [text_document(np.full(seq_len + 1, base + i)) for i in range(count)]
        self.lazy = lazy

    def dataset(self, shard=slice(None)):
        documents = grain.MapDataset.source(self.documents)[shard]
        return documents.to_iter_dataset() if self.lazy else documents


COUNTING = f"{__name__}:Counting"


def data(packing="concat", streams=1, **sources):
    return DataConfig(tokenizer="bytes", sources=sources, packing=packing, streams=streams)


def loader(sources, batch_size=4, seq_len=64, seed=0, **options):
    config = data(**sources) if isinstance(sources, dict) else sources
    return make_loader(config, seq_len=seq_len, batch_size=batch_size, seed=seed, **options)


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


MIXTURES = {
    "two maps": dict(a=source("retrieval", weight=0.7), b=source("embedded", weight=0.3)),
    "map and iter": dict(
        a=source(COUNTING, lazy=True), b=source("retrieval"), c=source("embedded")
    ),
    "best fit": dict(packing="best_fit", a=source("retrieval"), b=source("embedded")),
}


@pytest.fixture(params=MIXTURES, ids=list(MIXTURES))
def mixture(request):
    return MIXTURES[request.param]


def test_batches(mixture):
    for batch in take(loader(mixture), 3):
        assert batch.keys() == FIELDS
        assert {v.shape for v in batch.values()} == {(4, 64)}
        assert all(v.dtype == np.int32 for n, v in batch.items() if n != "loss_weights")
        assert batch["loss_weights"].dtype == np.float32


def test_deterministic(mixture):
    assert_same(take(loader(mixture), 8), take(loader(mixture), 8))
    first, other = take(loader(mixture), 2), take(loader(mixture, seed=1), 2)
    assert not np.array_equal(first[1]["tokens"], other[1]["tokens"])


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_resume(mixture, steps):
    iterator = loader(mixture)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 10)
    resumed = loader(mixture)
    if steps % 2:
        next(resumed)
    resumed.set_state(state)
    assert_same(take(resumed, 10), expected)


def test_weights_are_shares_of_rows():
    sources = dict(a=source(COUNTING, weight=3.0, base=100), b=source(COUNTING, base=200))
    tokens = np.concatenate([b["tokens"][:, 0] for b in take(loader(sources), 20)])
    assert (tokens < 200).mean() == 0.75


def test_weight_zero_leaves_out():
    sources = dict(a=source(COUNTING, weight=0.0), b=source(COUNTING, base=200))
    assert all((b["tokens"] >= 200).all() for b in take(loader(sources), 5))


def test_epochs_are_whole_and_shuffled_anew():
    tokens = np.concatenate([b["tokens"][:, 0] for b in take(loader(dict(a=source(COUNTING))), 10)])
    epochs = tokens.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(100, 110))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def parts(mixture, streams, processes, batch_size=8):
    """The loaders of all processes, each of which holds as many rows."""
    config = dict(mixture, streams=streams)
    size = batch_size // processes
    needed = [range(size * i, size * (i + 1)) for i in range(processes)]
    options = dict(batch_size=batch_size, needed=needed)
    return [loader(config, process=i, **options) for i in range(processes)]


def whole(loaders, count):
    """Batches put together from the rows that each process needs."""
    batches = [take(part, count) for part in loaders]
    size = 8 // len(loaders)
    row = lambda i, part: slice(size * i - part.rows.start, size * (i + 1) - part.rows.start)
    return [
        {
            name: np.concatenate(
                [batch[name][row(i, part)] for i, (part, batch) in enumerate(zip(loaders, each))]
            )
            for name in FIELDS
        }
        for each in zip(*batches, strict=True)
    ]


@pytest.mark.parametrize("streams", (1, 2, 4))
def test_the_order_of_rows_does_not_depend_on_the_processes(mixture, streams):
    alone = whole(parts(mixture, streams, 1), 5)
    for processes in (2, 8):
        assert_same(whole(parts(mixture, streams, processes), 5), alone)


def test_streams_part_the_documents():
    [one] = parts(dict(a=source(COUNTING, count=16)), 2, 1)
    first, second = (np.split(b["tokens"][:, 0], 2) for b in take(one, 2))
    left, right = ({int(t) for rows in part for t in rows} for part in zip(first, second))
    assert left | right == set(range(100, 116)) and not left & right


def test_each_stream_is_saved_once_and_resumes_on_other_processes(mixture, tmp_path):
    before = parts(mixture, 4, 2)
    assert [part.rows for part in before] == [range(0, 4), range(4, 8)]  # and reads no others
    for part in before:
        for _ in range(3):
            next(part)
    saved = sum((saved_by(part, tmp_path / "data") for part in before), [])
    assert sorted(saved) == [f"stream_{i}.json" for i in range(4)]
    expected = whole(before, 4)
    for processes in (1, 2, 8):
        after = parts(mixture, 4, processes)
        for part in after:
            asyncio.run(finished(part.load(tmp_path / "data")))
        assert_same(whole(after, 4), expected)


async def finished(begun):
    await (await begun)


def saved_by(part, directory):
    """The names of the files that one process writes."""

    class Directory:
        async def await_creation(self):
            directory.mkdir(exist_ok=True)
            return directory

    before = set(directory.iterdir()) if directory.exists() else set()
    asyncio.run(finished(part.save(Directory())))
    return [path.name for path in set(directory.iterdir()) - before]


def test_retrieval_rows_are_whole_documents():
    made = build_source(source("retrieval"), ByteTokenizer(), seq_len=64, split="train", seed=0)
    (batch,) = take(loader(dict(a=source("retrieval"))), 1)
    for i in range(4):
        np.testing.assert_array_equal(batch["tokens"][i], made[i]["tokens"][:-1])
        np.testing.assert_array_equal(batch["targets"][i], made[i]["tokens"][1:])
        np.testing.assert_array_equal(batch["answers"][i], made[i]["answers"][1:])
    assert (batch["segments"] == 1).all() and (batch["positions"] == np.arange(64)).all()


def test_align():
    for batch in take(loader(dict(a=source("embedded")), align=16, split="tune"), 20):
        starts = (batch["positions"] == 0) & (batch["segments"] > 0)
        assert not (np.nonzero(starts)[1] % 16).any()


def test_splits_differ():
    rows = {}
    for split in ("train", "tune", "heldout"):
        batches = take(loader(dict(a=source("embedded")), seq_len=256, split=split), 5)
        rows[split] = {row.tobytes() for b in batches for row in b["tokens"]}
    assert not rows["train"] & rows["heldout"] and not rows["tune"] & rows["heldout"]


@pytest.mark.parametrize(
    "sources, options, message",
    [
        (dict(), dict(), "config.data.sources is empty"),
        (dict(a=source(COUNTING, weight=-1.0)), dict(), "sources.a.weight is -1.0"),
        (dict(a=source(COUNTING, weight=0.0)), dict(), "every weight in config.data.sources is 0"),
        (dict(a={"type": "pile"}), dict(), "unknown component 'pile'"),
        (dict(a={"type": "text"}), dict(), "text needs the option path"),
        (dict(a={"type": "retrieval", "fact": 4}), dict(), "no option fact; did you mean facts"),
        (dict(a=source(COUNTING)), dict(split="test"), "unknown split 'test'"),
        (
            dict(a=source(COUNTING, count=3), streams=4),
            dict(),
            "sources.a has no document for stream 3 of 4",
        ),
        (dict(a=source(COUNTING), streams=3), dict(), "streams is 3: it must divide batch_size 4"),
        (dict(a=source(COUNTING), streams=0), dict(), "streams is 0: it must divide batch_size 4"),
    ],
    ids=[
        *("none", "negative", "zero", "unknown", "missing", "option", "split"),
        *("few documents", "no divisor", "no stream"),
    ],
)
def test_faults(sources, options, message):
    with pytest.raises(UserError, match=message):
        loader(sources, **options)
