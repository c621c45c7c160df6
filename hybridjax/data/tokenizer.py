"""Text to token ids and back: bytes by default, or any `tokenizer.json`."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from hybridjax.config import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    name: str
    fingerprint: str  # changes whenever the same text may give other ids
    vocab: int
    eos: int  # ends a document

    def encode(self, text: str) -> Int[np.ndarray, " T"]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes; byte 0, which text does not contain, ends a document."""

    name = fingerprint = "bytes"
    vocab = 256
    eos = 0

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have a larger vocabulary: 0xFF is never valid UTF-8, so it is replaced.
        return bytes(i if 0 <= i < 256 else 0xFF for i in map(int, ids)).decode(errors="replace")


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, path: str | pathlib.Path):
        import tokenizers

        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer {path} ({error.strerror}): give 'bytes' or the path "
                "of a tokenizer.json"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception and ValueError
            raise UserError(f"{path} is not a tokenizer.json of `tokenizers`: {error}") from error
        self.name = str(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        ids = self._tokenizer.get_vocab()
        self.vocab = max(ids.values()) + 1
        self.eos = _end_token(path, ids)

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(name: str) -> Tokenizer:
    """`"bytes"`, or the path of a tokenizer.json or of the folder that holds it."""
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


def _end_token(path: pathlib.Path, ids: dict[str, int]) -> int:
    config = path.with_name("tokenizer_config.json")
    named = json.loads(config.read_text()).get("eos_token") if config.exists() else None
    named = named["content"] if isinstance(named, dict) else named
    for token in (named, *END_TOKENS):
        if token in ids:
            return ids[token]
    raise UserError(
        f"{path} has no end-of-document token: put a tokenizer_config.json with `eos_token` "
        f"beside it, or add one of {', '.join(END_TOKENS)}"
    )


class TextStream:
    """Decodes tokens as they are generated; a character is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # printed, and kept since decoding may depend on it
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete."""
        self._pending += [int(i) for i in ids]
        text = self._new_text()
        # No character has more than four bytes: a longer wait is for text that is not UTF-8.
        if text.endswith(REPLACEMENT) and len(self._pending) < 4:
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The rest, incomplete characters replaced."""
        text = self._new_text()
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._context + self._pending)[len(decode(self._context)) :]
