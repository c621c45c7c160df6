"""Writes the embedded text: `python hybridjax/data/embedded/make.py`, under Python 3.11 only.

The prose of Python's language reference (`pydoc_data.topics`), one document per topic, ASCII,
documents separated by NUL. Topics quote each other's sections; every paragraph is kept once, in
the longest topic that has it, so that no paragraph of a held-out document is trained on.
"""

import hashlib
import lzma
import pathlib

FILE = pathlib.Path(__file__).with_name("pydoc_topics.txt.xz")
ASCII = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-",
    "\u2026": "...", "\u00b0": " degrees", "\u00df": "ss",
})  # fmt: skip
SHORTEST = 256  # characters; a topic with less left of its own is dropped


def main() -> None:
    from pydoc_data.topics import topics

    seen, kept = set(), {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = topics[name].translate(ASCII).strip().split("\n\n")
        own = [p for p in paragraphs if " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in own)
        kept[name] = "\n\n".join(own) + "\n"
    texts = [kept[name] for name in sorted(kept) if len(kept[name]) >= SHORTEST]
    data = "\0".join(texts).encode("ascii")
    FILE.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(texts)} documents, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
