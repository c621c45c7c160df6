import json
import sys

import grain
import numpy as np
import pytest

from hybridjax.config import UserError
from hybridjax.data.files import ArrayRecord, Parquet, SplitNumbers, Text, Tokens
from hybridjax.data.sources import SPLITS
from hybridjax.data.tokenizer import ByteTokenizer

TEXTS = [f"document {i}: {'word ' * (i % 7)}ü" for i in range(40)]
BYTES = ByteTokenizer()


def write_text(folder, texts=TEXTS):
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)
    return Text, dict(path=f"{folder}/*.txt")


def write_lines(folder, texts=TEXTS):
    (folder / "all.txt").write_text("\n".join(texts))
    return Text, dict(path=f"{folder}/all.txt", separator="\n")


def write_jsonl(folder, texts=TEXTS):
    lines = [json.dumps({"body": text, "n": 1}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines[:15]) + "\n\n")
    (folder / "b.jsonl").write_text("\n".join(lines[15:]))
    return Text, dict(path=f"{folder}/*.jsonl", column="body")


def write_parquet(folder, texts=TEXTS, files=2):
    import pyarrow
    import pyarrow.parquet

    cuts = np.array_split(np.array(texts, object), files)
    for i, cut in enumerate(cuts):
        table = pyarrow.table({"id": list(range(len(cut))), "body": pyarrow.array(cut, "string")})
        pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=7)
    return Parquet, dict(path=f"{folder}/*.parquet", column="body")


def write_arrayrecord(folder, texts=TEXTS):
    module = pytest.importorskip("array_record.python.array_record_module")
    for name, part in (("a", texts[:15]), ("b", texts[15:])):
        writer = module.ArrayRecordWriter(str(folder / f"{name}.arrayrecord"), "group_size:1")
        for text in part:
            writer.write(text.encode())
        writer.close()
    return ArrayRecord, dict(path=f"{folder}/*.arrayrecord")


def write_tokens(folder, texts=TEXTS):
    for name, part in (("a", texts[:15]), ("b", texts[15:])):
        ids = np.concatenate([np.append(BYTES.encode(text), 0) for text in part])
        ids[: -1 if name == "b" else None].astype(np.uint16).tofile(folder / f"{name}.bin")
    return Tokens, dict(path=f"{folder}/*.bin")


KINDS = [write_text, write_lines, write_jsonl, write_parquet, write_arrayrecord, write_tokens]


def texts_of(source, shard=slice(None), count=None):
    dataset = source.dataset(shard)
    count = len(dataset) if count is None else count
    iterator = iter(dataset)
    found = []
    for _ in range(count):
        document = next(iterator)
        assert {k: v.dtype for k, v in document.items()} == dict(
            tokens=np.int32, loss_weights=np.float32, answers=np.int32
        )
        assert (document["loss_weights"] == 0.5).all() and not document["answers"].any()
        found.append(BYTES.decode(document["tokens"]).removesuffix("\0"))
    return found


@pytest.fixture(params=KINDS, ids=[kind.__name__.removeprefix("write_") for kind in KINDS])
def kind(request, tmp_path):
    cls, options = request.param(tmp_path)
    return lambda split, **more: cls(
        BYTES, 64, split, 0, **options, **{"heldout": 0.1, "loss_weight": 0.5} | more
    )


SIZES = {"train": 32, "tune": 4, "heldout": 4}


def test_splits_part_the_documents(kind):
    found = [text for split in SPLITS for text in texts_of(kind(split), count=SIZES[split])]
    assert sorted(found) == sorted(TEXTS)


@pytest.mark.parametrize(
    "count, drawn", [(2, 60), (8, 10)], ids=["few streams", "many streams"]
)
def test_shards_part_the_documents(kind, count, drawn):
    source, found = kind("train"), []
    for i in range(count):
        dataset = source.dataset(slice(i, None, count))
        if isinstance(dataset, grain.MapDataset):
            found += texts_of(source, slice(i, None, count))
        else:  # endless: each document comes again and again
            found += set(texts_of(source, slice(i, None, count), drawn))
    assert sorted(found) == sorted(t for t in texts_of(kind("train"), count=32))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("heldout", [0.01, 0.3, 1 / 3])
def test_split_numbers(split, heldout):
    numbers = SplitNumbers(1000, split, heldout, "x")
    found = list(numbers)
    assert len(found) == len(numbers)
    assert found == [n for n in range(1000) if numbers.rank(n) is not None]
    assert [numbers.rank(n) for n in found] == list(range(len(found)))
    if split != "train":
        assert len(found) / 1000 == pytest.approx(heldout, rel=0.15)


def test_a_split_has_a_document_from_three_on():
    for split in SPLITS:
        assert len(SplitNumbers(3, split, 0.01, "x")) == 1
    with pytest.raises(UserError, match="corpus has 2 documents, none for the split 'train'"):
        SplitNumbers(2, "train", 0.01, "corpus")


def test_parquet_with_more_streams_than_documents(tmp_path):
    cls, options = write_parquet(tmp_path)
    source = cls(BYTES, 64, "heldout", 0, heldout=0.1, **options)
    with pytest.raises(UserError, match="has 4 documents, too few for 5 streams"):
        source.dataset(slice(4, None, 5))


def test_parquet_resumes(tmp_path):
    cls, options = write_parquet(tmp_path)
    dataset = cls(BYTES, 64, "train", 0, heldout=0.1, **options).dataset()
    iterator = iter(dataset)
    for _ in range(11):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)["tokens"] for _ in range(60)]
    resumed = iter(dataset)
    resumed.set_state(state)
    for tokens in expected:
        np.testing.assert_array_equal(next(resumed)["tokens"], tokens)


# ---------------------------------------------------------------- faults


def no_files(folder):
    return Text, dict(path=f"{folder}/*.txt")


def empty_file(folder):
    (folder / "a.txt").write_text("")
    return Text, dict(path=f"{folder}/a.txt")


def latin_file(folder):
    (folder / "a.txt").write_bytes("é".encode("latin-1"))
    return Text, dict(path=f"{folder}/a.txt")


def wrong_field(folder):
    return write_jsonl(folder)[0], dict(path=f"{folder}/a.jsonl", column="text")


def garbage_parquet(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 this is nothing PAR1")
    return Parquet, dict(path=f"{folder}/a.parquet")


def cut_parquet(folder):
    cls, options = write_parquet(folder)
    path = folder / "0.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    return cls, options


def wrong_column(folder):
    return write_parquet(folder)[0], dict(path=f"{folder}/*.parquet", column="text")


def garbage_arrayrecord(folder):
    pytest.importorskip("array_record")
    (folder / "a.arrayrecord").write_bytes(b"nothing" * 30)
    return ArrayRecord, dict(path=f"{folder}/a.arrayrecord")


def large_ids(folder):
    np.array([1, 2, 300, 0], np.uint16).tofile(folder / "a.bin")
    return Tokens, dict(path=f"{folder}/a.bin")


def odd_bytes(folder):
    (folder / "a.bin").write_bytes(b"abc")
    return Tokens, dict(path=f"{folder}/a.bin")


def wrong_dtype(folder):
    return write_tokens(folder)[0], dict(path=f"{folder}/a.bin", dtype="int8")


def heldout_share(folder):
    return write_text(folder)[0], dict(path=f"{folder}/*.txt", heldout=0.7)


FAULTS = [
    (no_files, "no file at"),
    (empty_file, "has 0 documents"),
    (latin_file, "is not UTF-8 text"),
    (wrong_field, "line 1, is no JSON object with the field 'text'"),
    (garbage_parquet, "is not a readable Parquet file"),
    (cut_parquet, "is not a readable Parquet file"),
    (wrong_column, "has no column 'text': set `column` to one of id, body"),
    (garbage_arrayrecord, "is not readable ArrayRecord"),
    (large_ids, "has the token id 300, but the tokenizer bytes has 256 ids"),
    (odd_bytes, "has 3 bytes, which is no array of uint16"),
    (wrong_dtype, "token files of int8 are not read: use uint16 or uint32"),
    (heldout_share, "heldout is 0.7: it must be above 0 and at most 1/3"),
]


@pytest.mark.parametrize("make, message", FAULTS, ids=[make.__name__ for make, _ in FAULTS])
def test_faults(make, message, tmp_path):
    cls, options = make(tmp_path)
    with pytest.raises(UserError, match=message) as fault:
        cls(BYTES, 64, "train", 0, **options)
    assert "\n" not in str(fault.value)


def test_corrupt_row_group(tmp_path):
    cls, options = write_parquet(tmp_path, files=1)
    path = tmp_path / "0.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)  # the footer stays whole
    path.write_bytes(data)
    iterator = iter(cls(BYTES, 64, "train", 0, heldout=0.1, **options).dataset())
    with pytest.raises(UserError, match="row group [0-9], is corrupt"):
        for _ in range(40):
            next(iterator)


@pytest.mark.parametrize("cls, module", [(Parquet, "pyarrow"), (ArrayRecord, "array_record")])
def test_missing_extra(cls, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"need {module}: pip install 'hybridjax\[data\]'"):
        cls(BYTES, 64, "train", 0, path="a")
