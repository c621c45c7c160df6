"""The work directory of a run: whose it is, and the run opened to be measured or talked to."""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from hybridjax.checkpoint import restore_model
from hybridjax.config import Config, MeshConfig, UserError, typed
from hybridjax.data.tokenizer import Tokenizer, load_tokenizer
from hybridjax.files import one_line, read_json, write_json
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import make_mesh, place_parameters


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: pathlib.Path
    config: Config
    model: Decoder
    tokenizer: Tokenizer
    step: int
    metadata: dict[str, Any]

    @property
    def logit_base(self) -> float | None:
        """The base of the log scaling that evaluation chose; None: no scaling."""
        return self.metadata.get("logit_base")


def open_run(workdir: str | pathlib.Path, step: int | None = None) -> Run:
    """The model of a work directory's newest checkpoint, or of `step`, on the run's mesh, or on
    the like of it that the devices here allow.

    Raises `UserError` where there is no run, or no checkpoint that can be read.
    """
    config = typed(load_config(workdir))
    jax.set_mesh(nearest_mesh(config.mesh))
    new_model = lambda: place_parameters(Decoder(config.model, jax.random.key(0)))
    abstract = jax.jit(new_model).eval_shape()
    model, step, metadata = restore_model(workdir, abstract, step)
    tokenizer = load_tokenizer(config.data.tokenizer)
    return Run(pathlib.Path(workdir), config, model, tokenizer, step, metadata)


def nearest_mesh(wanted: MeshConfig) -> jax.sharding.Mesh:
    """The run's mesh, or the nearest that the devices here allow."""
    try:
        return make_mesh(wanted)
    except UserError as error:
        left, sizes = jax.device_count(), {}
        for axis in ("tensor", "context", "fsdp"):
            size = getattr(wanted, axis)
            sizes[axis] = left if size == -1 else math.gcd(size, left)
            left //= sizes[axis]
        mesh = make_mesh(MeshConfig(**sizes))
        line = f"trained elsewhere: {error}; now it is {dict(mesh.shape)}"
        logging.getLogger("hybridjax").warning(line)
        return mesh


# ---------------------------------------------------------------- whose directory it is


def claim(
    workdir: str | os.PathLike, config: Mapping[str, Any], allowed: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Record `config` as the directory's own; return the one it had, None for a new directory.

    Raises `UserError` as `check_owner` does, or where the directory cannot be written.
    """
    previous = check_owner(workdir, config, allowed)
    path = _config_file(workdir)
    if _as_json(config) != previous and jax.process_index() == 0:
        with one_line(f"cannot use {path}: ", "choose another workdir"):
            write_json(path, _as_json(config))
    return previous


def check_owner(
    workdir: str | os.PathLike, config: Mapping[str, Any], allowed: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """The configuration that the directory has, None for a new directory; writes nothing.

    Args:
      allowed: globs of dotted keys that may change from one start to the next.

    Raises:
      UserError: the directory belongs to another configuration, or cannot be read.
    """
    previous = read_json(_config_file(workdir))
    old, new = dict(_dotted(previous or {})), dict(_dotted(_as_json(config)))
    changed = [
        f"{key}: {old.get(key, 'not set')!r} there, {new.get(key, 'not set')!r} here"
        for key in sorted(old.keys() | new.keys())
        if not any(fnmatch.fnmatchcase(key, glob) for glob in allowed)
        and (key not in old or key not in new or old[key] != new[key])
    ]
    if previous is not None and changed:
        more = [f"and {len(changed) - 5} more"] if len(changed) > 5 else []
        raise UserError(
            f"{workdir} belongs to another configuration ({'; '.join(changed[:5] + more)}): "
            "choose another workdir"
        )
    return previous


def hold(workdir: str | os.PathLike) -> contextlib.ExitStack:
    """Keeps other processes from writing to the directory, until what it returns is closed or this
    process ends. In an object store, or where file locks do not exist, nothing keeps them.

    Raises `UserError` where another process holds it.
    """
    held, path = contextlib.ExitStack(), epath.Path(workdir) / ".lock"
    if jax.process_index() == 0 and "://" not in os.fspath(path):
        with one_line(f"cannot use {path}: ", "choose another workdir"):
            file = held.enter_context(path.open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise UserError(
                f"another process is at work in {workdir}: wait for it, or choose another workdir"
            ) from None
        except OSError:
            pass  # this file system has no locks
    return held


def load_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The configuration of the run in `workdir`."""
    config = read_json(_config_file(workdir))
    if config is None:
        raise UserError(f"no hybridjax run in {workdir}: there is no config.json; correct the path")
    return config


def _config_file(workdir: str | os.PathLike) -> epath.Path:
    return epath.Path(workdir) / "config.json"


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))  # tuples are lists in the file


def _dotted(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
