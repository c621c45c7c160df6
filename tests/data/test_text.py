import lzma

import pytest

from hybridjax.config import UserError
from hybridjax.data import text
from hybridjax.data.sources import SPLITS
from hybridjax.data.text import Embedded, documents
from hybridjax.data.tokenizer import ByteTokenizer

SHARES = {"train": 0.8, "tune": 0.1, "heldout": 0.1}


@pytest.mark.parametrize("split", SPLITS)
def test_share_of_bytes(split):
    total = sum(len(t) for s in SPLITS for t in documents(s))
    assert sum(map(len, documents(split))) / total == pytest.approx(SHARES[split], abs=0.01)


def test_splits_share_no_paragraph():
    def paragraphs(split):
        return {" ".join(p.split()) for t in documents(split) for p in t.split("\n\n")} - {""}

    train, tune, heldout = map(paragraphs, SPLITS)
    assert not train & tune and not train & heldout and not tune & heldout


def test_text_is_plain():
    joined = "".join(t for split in SPLITS for t in documents(split))
    assert joined.isascii() and "\0" not in joined
    assert sum(len(documents(split)) for split in SPLITS) == 57


def test_unknown_split():
    with pytest.raises(UserError, match="unknown split 'test': there are train, tune, heldout"):
        documents("test")


def test_changed_text_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "text.xz"
    path.write_bytes(lzma.compress(b"another text"))
    monkeypatch.setattr(text, "FILE", path)
    text._splits.cache_clear()
    with pytest.raises(UserError, match="has sha256"):
        documents("train")
    text._splits.cache_clear()


@pytest.mark.parametrize("seq_len", [64, 1000])
def test_embedded_pieces_have_every_target_once(seq_len):
    source = Embedded(ByteTokenizer(), seq_len, "heldout", 0, loss_weight=0.5).dataset()
    pieces = [source[i] for i in range(len(source))]
    assert max(len(p["tokens"]) for p in pieces) == seq_len + 1
    targets = b"".join(bytes(p["tokens"][1:].tolist()) for p in pieces)
    assert targets == b"".join(t.encode()[1:] + b"\0" for t in documents("heldout"))
    assert all((p["loss_weights"] == 0.5).all() for p in pieces)
