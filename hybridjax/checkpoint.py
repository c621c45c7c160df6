"""Checkpoints and the identity of a work directory: the only file that knows Orbax.

    workdir/config.json         the configuration that the directory belongs to
    workdir/checkpoints/STEP/   one item per part of the state (`model`, `opt_state`, ...), the data
                                iterator's position, metadata and configuration
    workdir/metadata/STEP.json  metadata learnt after that checkpoint was written

A checkpoint bears its name only once it is complete. Each part has a checksum of its bits in the
metadata, because Orbax itself loads a checkpoint with flipped bits.
"""

import gc
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from hybridjax.config import UserError
from hybridjax.files import one_line, read_json, reason, write_json

# Orbax logs a failed write as hundreds of lines of traceback; we report it in one.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the best one."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep: int = 2,
        best: str | None = None,
        higher_is_better: bool = False,
    ):
        """`best`: the name in `metadata["metrics"]` by which one more checkpoint is kept."""
        self._workdir, self._directory = epath.Path(workdir), _directory(workdir)
        self._last = None  # the step last saved or restored
        sign = 1.0 if higher_is_better else -1.0
        policy = ocp.training.preservation_policies
        by_metric = policy.BestN(
            get_metric_fn=lambda metrics: sign * metrics[best] if best in metrics else -math.inf,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        kept = [policy.LatestN(max(1, keep)), *([by_metric] if best else [])]
        with one_line(f"cannot use {self._directory}: ", "choose another workdir"):
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                preservation_policy=policy.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    def save(
        self, step: int, state: Any, data: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write a checkpoint in the background, once the one before is complete.

        Args:
          state: a pytree whose top level has names, such as a `TrainState`.
          data: the data iterator.
          metadata: what else belongs to this step, JSON; its `metrics` decide which is the best.

        Raises:
          UserError: this or the previous checkpoint could not be written.
        """
        self.wait()
        if step == self._last:
            return
        self._last, parts, metadata = step, _parts(state), dict(metadata or {})
        metrics = {k: v for k, v in metadata.get("metrics", {}).items() if math.isfinite(v)}
        sums = {name: _checksum(part) for name, part in parts.items()}
        config = read_json(self._workdir / "config.json")
        with self._writing():
            _later_metadata(self._workdir, step).unlink(missing_ok=True)
            self._checkpointer.save_checkpointables_async(
                step,
                parts if data is None else parts | {"data": data},
                force=True,
                overwrite=True,
                metrics=metrics or None,
                custom_metadata={"config": config, "metadata": metadata, "checksums": sums},
            )

    def wait(self) -> None:
        """Block until the last checkpoint is on disk; raise as `save` does."""
        with self._writing():
            self._checkpointer.wait()

    def close(self) -> None:
        with self._writing():
            self._checkpointer.close()

    def restore(
        self, abstract_state: Any, data: Any = None, step: int | None = None
    ) -> tuple[Any, int, dict[str, Any]]:
        """(state, step, metadata) of the newest checkpoint that is whole, or of `step`.

        A damaged one is renamed, with a warning, so that it can neither be met again nor count as
        one of the newest.

        Args:
          abstract_state: shapes, dtypes and shardings, on any mesh.
          data: a data iterator, which is moved to its position at that step.

        Returns:
          The metadata as saved and updated, and under `config` the configuration of that time.
        """
        self.wait()
        found = _restore(
            self._checkpointer, self._workdir, abstract_state, data, step, self._set_aside
        )
        self._last = found[1]
        return found

    def _set_aside(self, step: int, alone: bool = False) -> None:
        path = self._directory / str(step)
        if alone or jax.process_index() == 0:
            with suppress(FileNotFoundError):  # another process may be faster
                path.replace(self._directory.parent / f"damaged_checkpoint_{step}")
        if not alone:
            multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
            self._checkpointer.reload()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        fault = f"checkpoint {self._last} could not be written to {self._directory}: "
        with one_line(fault, "the ones before are intact; make room and start again"):
            last, self._last = self._last, None  # a failed one may be tried again
            yield
            self._last = last


def restore_model(
    workdir: str | os.PathLike, abstract_model: Any, step: int | None = None
) -> tuple[Any, int, dict[str, Any]]:
    """(model, step, metadata) of the newest whole checkpoint of a run, or of `step`; reads only."""
    directory = _directory(workdir)
    if not directory.exists():
        raise UserError(f"no checkpoint in {directory}: train there first or correct the path")
    with ocp.training.Checkpointer(directory) as checkpointer:
        state, step, metadata = _restore(
            checkpointer, epath.Path(workdir), {"model": abstract_model}, None, step
        )
    return state["model"], step, metadata


def latest_step(workdir: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint of a run, None where there is none; reads only."""
    directory = _directory(workdir)
    if not directory.exists():
        return None
    with ocp.training.Checkpointer(directory) as checkpointer:
        return max((checkpoint.step for checkpoint in checkpointer.checkpoints), default=None)


def update_metadata(workdir: str | os.PathLike, step: int, updates: Mapping[str, Any]) -> None:
    """Add to the metadata of a checkpoint that is already written."""
    path = _later_metadata(workdir, step)
    with one_line(f"cannot write {path}: ", "make room or correct the path"):
        write_json(path, (read_json(path) or {}) | dict(updates))


# ---------------------------------------------------------------- reading


class _Damaged(Exception):
    """`alone`: the other processes may have found nothing, and wait for this one in Orbax."""

    def __init__(self, fault: str, alone: bool = False):
        super().__init__(fault)
        self.alone = alone and jax.process_count() > 1


def _restore(
    checkpointer: ocp.training.Checkpointer,
    workdir: epath.Path,
    abstract_state: Any,
    data: Any,
    step: int | None,
    set_aside: Callable[..., None] = lambda step, alone=False: None,
) -> tuple[Any, int, dict[str, Any]]:
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint {step} in {workdir}: there are {steps}")
    damaged = []
    for candidate in sorted(steps, reverse=True) if step is None else [step]:
        try:
            with _silent_coroutines():
                state, metadata = _load(checkpointer, candidate, abstract_state, data)
        except _Damaged as error:
            damaged.append(candidate)
            fault = f"checkpoint {candidate} in {workdir} cannot be loaded: {error}"
            if error.alone:
                set_aside(candidate, alone=True)
                raise UserError(
                    f"{fault}; start the training again, to use the one before"
                ) from error
            logging.getLogger("hybridjax").warning(fault)
        else:
            for newer in damaged:
                set_aside(newer)
            later = read_json(_later_metadata(workdir, candidate)) or {}
            return state, candidate, metadata | later
    raise UserError(f"no checkpoint that loads in {workdir}: choose another workdir")


def _load(checkpointer, step: int, abstract_state: Any, data: Any) -> tuple[Any, dict[str, Any]]:
    wanted = jax.tree.map(_placed, _parts(abstract_state))
    try:
        saved = checkpointer.checkpointables_metadata(step)
        record = saved.custom_metadata
        if not record:
            raise _Damaged("its metadata is torn or missing")
        _check_shapes(step, {name: saved.metadata[name] for name in wanted}, wanted)
        items = wanted if data is None else wanted | {"data": data}
        parts = checkpointer.load_checkpointables(step, items)
    except (UserError, _Damaged):
        raise
    except Exception as error:  # Orbax, TensorStore, JSON and the file system each have their own
        fault = f"its files are torn or missing: {reason(_root(error))}"
        raise _Damaged(fault, alone=True) from error
    for name in wanted:
        if _checksum(parts[name]) != record["checksums"][name]:
            raise _Damaged(f"the bits of {name} have changed")
    leaves = [parts[part][name] for part, name in _names(abstract_state)]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
    return state, record["metadata"] | {"config": record["config"]}


def _check_shapes(step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for part in wanted:
        for name in sorted(saved[part].keys() | wanted[part].keys()):
            there = saved[part][name].shape if name in saved[part] else "absent"
            here = _shape(wanted[part][name]) if name in wanted[part] else "absent"
            if there != here:
                raise UserError(
                    f"checkpoint {step} does not fit the configuration: {part}/{name} is {there} "
                    f"there and {here} here"
                )


def _shape(leaf: Any) -> tuple[int, ...]:
    return jax.eval_shape(_bits, leaf).shape  # a key's is that of its words


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to load for a leaf; shapes traced under a mesh know only its axes, scalars not even."""
    sharding, mesh = getattr(leaf, "sharding", None), jax.sharding.get_mesh()
    traced = sharding is None or isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    if traced and not mesh.empty:
        sharding = NamedSharding(mesh, sharding.spec if sharding else PartitionSpec())
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# ---------------------------------------------------------------- the state as named parts


def _parts(state: Any) -> dict[str, dict[str, Any]]:
    """`{"model": {"groups/0/mlp/up/kernel": array, ...}, "opt_state": ..., "step": ...}`."""
    parts = {}
    for (part, name), leaf in zip(_names(state), jax.tree.leaves(state), strict=True):
        parts.setdefault(part, {})[name] = leaf
    return parts


def _names(state: Any) -> list[tuple[str, str]]:
    """(part, name) of each leaf, in the order of the leaves."""
    names = []
    for path, _ in jax.tree.leaves_with_path(state):
        part, _, name = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
        names.append((part, name.removesuffix("/value") or "value"))
    return names


def _checksum(part: Mapping[str, Any]) -> int:
    return int(_sum_of_bits([part[name] for name in sorted(part)]))


@jax.jit
def _sum_of_bits(leaves: list[jax.Array]) -> jax.Array:
    """A sum modulo 2³² of all bits; it does not depend on its order, hence not on the sharding."""
    total = jnp.uint32(0)
    for i, leaf in enumerate(leaves):
        total += jnp.uint32(2 * i + 1) * jnp.sum(_bits(leaf).astype(jnp.uint32), dtype=jnp.uint32)
    return total


def _bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x if x.dtype == bool else x.view(f"uint{8 * x.dtype.itemsize}")


# ---------------------------------------------------------------- files and faults


def _directory(workdir: str | os.PathLike) -> epath.Path:
    return epath.Path(workdir).resolve() / "checkpoints"


def _later_metadata(workdir: str | os.PathLike, step: int) -> epath.Path:
    return epath.Path(workdir) / "metadata" / f"{step}.json"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def _silent_coroutines() -> Iterator[None]:
    """After a failed read Orbax leaves coroutines that complain when they are collected."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                yield
            except _Damaged as error:
                fault = _Damaged(str(error), error.alone)  # the traceback would keep the coroutines
            else:
                return
            gc.collect()
            raise fault
    finally:
        sys.unraisablehook = hook
