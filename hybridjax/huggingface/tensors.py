"""The tensors of a Hugging Face directory: safetensors files, one or several with an index.

Reading maps the files into memory, so that only the ranges that a device asks for are read, and
none of them twice. Nothing is ever unpickled.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hybridjax.config import UserError
from hybridjax.files import one_line, read_json, reason, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {  # that we read, by their names in a header
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: pathlib.Path
    dtype: str  # in the words of safetensors
    shape: tuple[int, ...]
    start: int  # byte in the file
    stop: int


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a directory by name, each a view of its file."""

    def __init__(self, directory: pathlib.Path):
        """Raises `UserError` where files are missing or torn, or are pickles."""
        self.places: dict[str, Place] = {}
        for file in _files(directory):
            self.places |= dict(_header(file))
        self._bytes: dict[pathlib.Path, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        place = self.places[name]
        if place.file not in self._bytes:
            self._bytes[place.file] = np.memmap(place.file, np.uint8, "r")
        data = self._bytes[place.file][place.start : place.stop]
        return np.asarray(data).view(DTYPES[place.dtype]).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = read_json(directory / INDEX)
    if index is None:
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        raise UserError(_nothing(directory))
    try:
        names = sorted(set(index["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{directory / INDEX} has no weight_map: fetch it again") from error
    here = lambda name: pathlib.PurePath(name).name == name and (directory / name).is_file()
    if missing := [name for name in names if not here(name)]:
        raise UserError(
            f"{directory} lacks {', '.join(missing)}, of {len(names)} shards: fetch them again"
        )
    return [directory / name for name in names]


def _nothing(directory: pathlib.Path) -> str:
    pickles = [path.name for path in sorted(directory.glob("*")) if path.suffix in (".bin", ".pt")]
    if pickles:
        return (
            f"{directory} holds {pickles[0]}, a pickle, which can run code and is never read: save "
            "the model as safetensors"
        )
    return f"{directory} holds no {SINGLE} and no {INDEX}: correct the path"


def _header(file: pathlib.Path) -> Iterator[tuple[str, Place]]:
    """Names and places from a file's header (github.com/huggingface/safetensors, format)."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(opened.read(length))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if dtype in DTYPES and stop - start != DTYPES[dtype].itemsize * math.prod(shape):
                raise ValueError(f"{name} is {dtype} {list(shape)} in {stop - start} bytes")
            if 8 + length + stop > size:
                raise ValueError(f"{name} ends at byte {8 + length + stop} of {size}")
            yield name, Place(file, dtype, shape, 8 + length + start, 8 + length + stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is torn or not safetensors: {error}; fetch it again") from error


def write(
    directory: pathlib.Path,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int,
) -> None:
    """Files of at most `shard_bytes` (or one tensor), as `save_pretrained` names them.

    Args:
      sizes: the bytes of each tensor, in the order of `tensors`.
    """
    shards = _shards(sizes, shard_bytes)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    tensors = iter(tensors)
    with one_line(f"cannot write {directory}: ", "make room or correct the path"):
        for file, names in zip(files, shards, strict=True):
            held = dict(next(tensors) for _ in names)
            try:
                save_file(held, directory / file, {"format": "pt"})  # transformers asks for it
            except SafetensorError as error:
                raise OSError(reason(error)) from error
        if len(shards) > 1:
            weight_map = {n: f for f, names in zip(files, shards, strict=True) for n in names}
            total = {"total_size": sum(sizes.values())}
            write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards
