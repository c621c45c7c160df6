"""The edge of every command: flags in, one line out for a fault that the user can mend."""

import ctypes
import logging
import os
import pathlib
import platform
import runpy
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from hybridjax import processes
from hybridjax.config import UserError, override

FLAGS = flags.FLAGS


def define_config() -> None:
    """`--config=configs/FILE.py:PRESET[,VARIANT...][,key=value...] --config.key=value ...`"""
    config_flags.DEFINE_config_file("config", None, "configs/FILE.py[:PRESET[,VARIANT...]]")


def config() -> ConfigDict:
    if FLAGS.config is None:
        raise UserError("no config: give --config=configs/hypenet.py")
    return FLAGS.config


def run(main: Callable[[], None], *, preemptible: bool = False) -> None:
    """Parses the flags and runs `main`; exits with 1 and one line on a user's fault.

    Args:
      preemptible: `main` asks `processes.StopRequest`, so SIGTERM is not the end at once.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    processes.define_flags()
    try:
        try:
            _check_config_file()
            rest = FLAGS(sys.argv)[1:]
        except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
            _explain_overrides()
            raise UserError(_one_line(error)) from error
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: settings are --config.key=value")
        processes.start(preemptible)
        prepare_jax()
        processes.agree(_settings())
        with processes.together():
            main()
    except UserError as error:
        processes.fail(str(error))


def _settings() -> dict[str, Any]:
    """What all processes must have in common: every flag but which process this is."""
    values = FLAGS.flag_values_dict()
    del values["process"]
    return {n: v.to_dict() if isinstance(v, ConfigDict) else v for n, v in values.items()}


def prepare_jax() -> None:
    """The CPU where no accelerator answers; compiled programs are kept between runs."""
    _keep_freed_memory()
    try:
        jax.devices()
    except RuntimeError as error:
        if jax.distributed.is_initialized():  # the others may have found theirs
            raise UserError(f"this process finds no devices: {_one_line(error)}") from error
        jax.config.update("jax_platforms", "cpu")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "hybridjax" / "compiled"))


def _keep_freed_memory() -> None:
    """Without this, glibc returns XLA's buffers to the kernel after every step, and a tiny model on
    the CPU spends a third of its time in page faults."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**27)
    mallopt(mmap_max, 0)


def _given_config() -> tuple[pathlib.Path, str | None] | None:
    """File and argument of the last `--config=FILE:ARG`, as ml-collections reads them."""
    given = [arg for arg in sys.argv[1:] if arg.startswith("--config=")]
    if not given:
        return None
    path, _, arg = given[-1].removeprefix("--config=").partition(":")
    return pathlib.Path(path), arg or None


def _check_config_file() -> None:
    """Without this, a missing file would show up only when a setting is read."""
    if (given := _given_config()) and not given[0].is_file():
        raise UserError(f"there is no config file {given[0]}: the shipped ones are in configs/")


def _explain_overrides() -> None:
    """Raises what is wrong with the first bad `--config.key=value`, if one of them is."""
    if not (given := _given_config()):
        return
    config = runpy.run_path(str(given[0]))["get_config"](given[1])
    for flag in sys.argv[1:]:
        if flag.startswith("--config.") and "=" in flag:
            key, _, value = flag.removeprefix("--config.").partition("=")
            override(config, key, value)


def _one_line(error: Exception) -> str:
    """The last line of a message: absl and ml-collections put the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
