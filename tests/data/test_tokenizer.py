import json

import numpy as np
import pytest

from hybridjax.config import UserError
from hybridjax.data.tokenizer import ByteTokenizer, TextStream, load_tokenizer

TEXTS = ["", "plain", "naïve café", "日本語のテキスト", "mixed 🎉 text\nwith lines\t"]


@pytest.fixture(params=["bytes", "json"])
def tokenizer(request, bpe):
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe))


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "ascii", "latin", "cjk", "emoji"])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not len(ids) or 0 <= ids.min() and ids.max() < tokenizer.vocab
    assert tokenizer.eos not in ids


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "ascii", "latin", "cjk", "emoji"])
def test_stream_prints_whole_characters(tokenizer, text):
    stream = TextStream(tokenizer)
    printed = [stream.push([i]) for i in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(printed) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in printed)


def test_stream_of_invalid_bytes_goes_on():
    stream = TextStream(ByteTokenizer())
    printed = "".join(stream.push([i]) for i in [0xE2, 0xE2, 0xE2, 0xE2, 0x41, 0x42])
    assert printed + stream.flush() == "\N{REPLACEMENT CHARACTER}" * 4 + "AB"


def test_bytes_beyond_the_vocabulary_are_replaced():
    assert ByteTokenizer().decode([65, 300, -1, 66]) == "A\N{REPLACEMENT CHARACTER}" * 1 + (
        "\N{REPLACEMENT CHARACTER}B"
    )


def test_json_tokenizer_facts(bpe):
    tokenizer = load_tokenizer(str(bpe))
    assert tokenizer.eos == 0
    assert tokenizer.vocab > 256
    assert len(tokenizer.encode("the cat and the dog")) < len("the cat and the dog")
    assert load_tokenizer(str(bpe.parent)).fingerprint == tokenizer.fingerprint


def test_eos_of_the_config_beside_it(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "e"}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos == tokenizer.encode("e")[0] != 0


def _without_eos(data: dict) -> dict:
    model = {**data["model"], "vocab": dict(data["model"]["vocab"])}
    del model["vocab"]["<|endoftext|>"]
    return {**data, "model": model, "added_tokens": []}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read the tokenizer"),
        ("{}", "is not a tokenizer.json"),
        ("not json", "is not a tokenizer.json"),
        (_without_eos, "no end-of-document token"),
    ],
    ids=["missing", "empty", "garbage", "no eos"],
)
def test_faults(content, message, bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        data = json.loads(bpe.read_text())
        path.write_text(json.dumps(content(data)) if callable(content) else content)
    with pytest.raises(UserError, match=message) as fault:
        load_tokenizer(str(path))
    assert "\n" not in str(fault.value)
