"""Turns a Transformer into a hybrid: `python -m hybridjax.distill --config=configs/halo.py`.

The stages are transfer, align, select, distill, finetune; `--stages=align,select` runs some of
them. The same command again resumes where the work directory stands.
"""

import dataclasses
import pathlib

import jax
from absl import flags

from hybridjax import command
from hybridjax.config import typed
from hybridjax.halo import report, stages
from hybridjax.halo.config import HaloConfig
from hybridjax.sharding import make_mesh
from hybridjax.workdir import claim

MAY_CHANGE = ("log_every", "checkpoint.*", "evaluation.*", "mesh.*", "name")


def main() -> None:
    halo, workdir = open_conversion()
    wanted = flags.FLAGS.stages or list(stages.STAGES)
    if stages.run(wanted, halo, workdir) and wanted[-1] == "finetune":
        report.report(halo, workdir)


def define_flags() -> None:
    command.define_config()
    flags.DEFINE_string("workdir", None, "where the conversion lives; default: runs/NAME")


def open_conversion() -> tuple[HaloConfig, pathlib.Path]:
    """The conversion that the flags name, its work directory and its mesh."""
    halo = typed(command.config(), HaloConfig)
    workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/{halo.name}")
    claim(workdir, dataclasses.asdict(halo), allowed=MAY_CHANGE)
    jax.set_mesh(make_mesh(halo.mesh))
    return halo, workdir


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_list("stages", [], "of transfer, align, select, distill, finetune; default: all")
    command.run(main, preemptible=True)
