import json

import grain
import numpy as np
import pytest

from hybridjax.config import UserError
from hybridjax.data.packing import pack

COUNT = 60


@pytest.fixture
def documents():
    """Documents in which a token names its document and its place; answers in some."""
    rng = np.random.default_rng(0)
    made = []
    for i, n in enumerate(rng.integers(2, 34, COUNT)):
        n = 150 if i == 7 else 33 if i == 8 else n  # longer than rows; just a row
        answers = np.zeros(n, np.int32)
        if i % 3 and n > 6:
            answers[2:4], answers[4:6] = 1, 2
        tokens = 1000 * (i + 1) + np.arange(n, dtype=np.int32)
        weights = rng.random(n).astype(np.float32)
        made.append(dict(tokens=tokens, loss_weights=weights, answers=answers))
    return made


def packed(documents, length, **options):
    source = grain.MapDataset.source(documents).to_iter_dataset()
    return pack(source, length, **options)


@pytest.fixture(params=["concat", "best_fit"])
def packing(request):
    return request.param


@pytest.fixture(params=[1, 8], ids=["align 1", "align 8"])
def align(request):
    return request.param


def test_rows(documents, packing, align):
    for row in packed(documents, 32, packing=packing, align=align):
        real = row["segments"] > 0
        assert {name: v.shape for name, v in row.items()} == dict.fromkeys(
            ("tokens", "targets", "loss_weights", "segments", "positions", "answers"), (32,)
        )
        assert {v.dtype for n, v in row.items() if n != "loss_weights"} == {np.dtype(np.int32)}
        assert row["loss_weights"].dtype == np.float32
        for name, values in row.items():
            assert not values[~real].any(), name
        # No target crosses documents, nor is another than the next token.
        np.testing.assert_array_equal(row["targets"][real], row["tokens"][real] + 1)
        segments = np.unique(row["segments"][real])
        np.testing.assert_array_equal(segments, np.arange(1, len(segments) + 1))
        for segment in segments:
            (places,) = np.nonzero(row["segments"] == segment)
            assert places[0] % align == 0
            np.testing.assert_array_equal(np.diff(places), 1)
            np.testing.assert_array_equal(row["positions"][places], np.arange(len(places)))
            np.testing.assert_array_equal(np.diff(row["tokens"][places]), 1)
            assert len({t // 1000 for t in row["tokens"][places]}) == 1


def test_nothing_is_lost(documents, packing, align):
    found = {}
    for row in packed(documents, 32, packing=packing, align=align):
        for i in np.flatnonzero(row["segments"]):
            assert row["targets"][i] not in found
            found[row["targets"][i]] = (row["loss_weights"][i], row["answers"][i] > 0)
    expected = {
        token: (weight, answer > 0)
        for d in documents
        for token, weight, answer in zip(
            d["tokens"][1:], d["loss_weights"][1:], d["answers"][1:], strict=True
        )
    }
    assert found == expected


def test_concat_fills_rows_and_best_fit_keeps_documents_whole(documents):
    concat = list(packed(documents, 32))
    assert all((row["segments"] > 0).all() for row in concat[:-1])
    best = list(packed(documents, 32, packing="best_fit"))
    starts = {int(t) for row in best for t in row["tokens"][row["positions"] == 0]} - {0}
    whole = {int(document["tokens"][0]) for document in documents}
    assert starts == whole | {8032, 8064, 8096, 8128}  # where the longest is cut
    assert len(best) < 1.15 * len(concat)


def test_answers_are_numbered_in_the_row(documents, packing):
    seen = 0
    for row in packed(documents, 32, packing=packing):
        spans = row["answers"][row["answers"] > 0]
        if not len(spans):
            continue
        steps = np.diff(spans)
        assert spans[0] == 1 and set(steps) <= {0, 1}
        for number in range(1, spans.max() + 1):
            assert (row["answers"] == number).sum() <= 2
        seen = max(seen, spans.max())
    assert seen >= 4  # from several documents


@pytest.mark.parametrize("length", [32, 64])
def test_document_of_a_row_fills_a_row(length, packing):
    document = dict(
        tokens=np.arange(length + 1, dtype=np.int32),
        loss_weights=np.ones(length + 1, np.float32),
        answers=np.zeros(length + 1, np.int32),
    )
    rows = list(packed([document] * 5, length, packing=packing))
    assert len(rows) == 5
    for row in rows:
        np.testing.assert_array_equal(row["tokens"], np.arange(length))
        np.testing.assert_array_equal(row["segments"], 1)


def test_documents_without_a_target_are_passed_over(packing):
    short = dict(
        tokens=np.ones(1, np.int32), loss_weights=np.ones(1, np.float32), answers=np.zeros(1, int)
    )
    long = {name: np.repeat(values, 5) for name, values in short.items()}
    (row,) = packed([short, long, short], 8, packing=packing)
    np.testing.assert_array_equal(row["segments"], [1, 1, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("steps", [0, 1, 5, 12])
def test_resumes_from_json(documents, packing, align, steps):
    dataset = packed(documents, 32, packing=packing, align=align)
    iterator = iter(dataset)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(dataset)
    next(resumed)
    resumed.set_state(state)
    rest, again = list(iterator), list(resumed)
    assert len(rest) == len(again) > 10
    for left, right in zip(rest, again, strict=True):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize(
    "length, options, message",
    [
        (100, dict(align=64), "seq_len 100 is not a multiple of 64.*: use 128"),
        (32, dict(packing="first"), "unknown packing 'first': there are concat, best_fit"),
    ],
    ids=["align", "packing"],
)
def test_faults(documents, length, options, message):
    with pytest.raises(UserError, match=message):
        packed(documents, length, **options)
