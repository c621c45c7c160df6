"""Whole runs of `hybridjax.train`: resuming, stopping, starting from elsewhere, accumulation."""

import os
import pathlib
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import MICRO, each_batch, end_state, train

from hybridjax import optimizer
from hybridjax.workdir import load_config

pytest_plugins = ("commands",)
pytestmark = pytest.mark.usefixtures("shared_compilation")
CONSTANT = f"{MICRO}:constant"


def at(step, act):
    """Does something when a run has drawn the batch of a step."""
    return each_batch(lambda number, batch: act(batch) if number == step else None)


def files(directory) -> dict[str, bytes]:
    paths = sorted(p for p in pathlib.Path(directory).rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", (1, 5))
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, finished, step):
    with at(step, lambda batch: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = train(tmp_path)
    assert stopped.code == 0 and stopped.err == ""
    assert f"stopped at step {step}; the same command resumes" in stopped.out
    assert end_state(tmp_path)["step"] == step
    done = train(tmp_path)
    assert done.code == 0 and f"resumed at step {step}" in done.out
    assert end_state(tmp_path) == end_state(finished)


def test_a_crashed_run_resumes_bit_for_bit(tmp_path, finished):
    def crash(batch):
        raise KeyboardInterrupt

    with at(5, crash), pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    before = end_state(tmp_path)
    assert before["step"] == 3 and before["metrics"][-1]["step"] == 4  # to be taken again
    assert "resumed at step 3" in train(tmp_path).out
    assert end_state(tmp_path) == end_state(finished)


def test_a_finished_run_is_measured_again_and_nothing_else(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert train(tmp_path).code == 0
    assert end_state(tmp_path) == end_state(finished)


def test_what_is_measured_is_complete(finished):
    steps = [line["step"] for line in end_state(finished)["metrics"]]
    assert steps == [2, 4, 4, 6, 7, 7]
    names = ("loss.png", "needle.png", "evaluation.json", "config.json")
    assert all((finished / name).stat().st_size for name in names)


# ---------------------------------------------------------------- another configuration


def test_another_configuration_is_refused(tmp_path, finished):
    before = files(finished)
    done = train(finished, "--config.model.width=32", "--config.seed=1", "--config.log_every=1")
    assert "model.width: 16 there, 32 here; seed: 0 there, 1 here" in done.error
    assert "log_every" not in done.error and "choose another workdir" in done.error
    assert files(finished) == before


def test_the_length_may_change_where_the_schedule_allows(tmp_path):
    settings = ("--config.checkpoint.keep=3", "--config.log_every=5", "--config.evaluation.every=9")
    assert train(tmp_path / "once", *settings, config=CONSTANT).code == 0
    assert train(tmp_path / "twice", "--config.steps=4", config=CONSTANT).code == 0
    assert train(tmp_path / "twice", *settings, config=CONSTANT).code == 0
    once, twice = end_state(tmp_path / "once"), end_state(tmp_path / "twice")
    assert all(once[part] == twice[part] for part in ("step", "arrays", "data"))


def test_the_length_may_not_change_under_a_schedule_that_used_it(finished):
    before = files(finished)
    done = train(finished, "--config.steps=20")
    assert "steps was 7 and is 20: the wsd schedule" in done.error
    assert files(finished) == before


# ---------------------------------------------------------------- numbers that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, finished):
    with at(5, lambda batch: batch["loss_weights"].fill(np.nan)):
        done = train(tmp_path)
    assert "the loss is nan at step 5; the last good checkpoint is at step 3" in done.error
    assert end_state(tmp_path)["step"] == 3
    assert train(tmp_path).code == 0
    assert end_state(tmp_path) == end_state(finished)


def test_a_learning_rate_that_explodes_stops_the_run(tmp_path):
    done = train(tmp_path, "--config.optimizer.learning_rate=1e30")
    assert "at step 2; there is no checkpoint: lower the learning rate" in done.error
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_update_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    explode = optax.scale_by_schedule(lambda count: jnp.where(count == 2, jnp.inf, 1.0))
    make = optimizer.make_optimizer
    chained = lambda *args: optax.chain(make(*args), explode)
    monkeypatch.setattr(optimizer, "make_optimizer", chained)
    done = train(tmp_path)
    assert "the update of step 3 is not finite; there is no checkpoint" in done.error
    assert not list((tmp_path / "checkpoints").iterdir())


# ---------------------------------------------------------------- where a run starts


def test_own_checkpoint_before_another_run_before_scratch(tmp_path, finished):
    source, new = tmp_path / "so@urce", tmp_path / "new"
    shutil.copytree(finished, source)
    still = ("--config.steps=1", "--config.optimizer.learning_rate=0.0",
             "--config.optimizer.final_learning_rate=0.0")  # fmt: skip
    model = lambda workdir: _part(end_state(workdir), "model")
    for init_from, same in ((f"{source}@6", False), (source, True)):
        shutil.rmtree(new, ignore_errors=True)
        done = train(new, *still, f"--config.init_from={init_from}", config=CONSTANT)
        assert done.code == 0, done
        assert (model(new) == model(finished)) is same
    before = model(new)
    shutil.rmtree(source)  # never looked at again
    done = train(new, *still, "--config.steps=2", f"--config.init_from={source}", config=CONSTANT)
    assert "resumed at step 1" in done.out and model(new) == before


def test_a_wrong_source_can_be_corrected(tmp_path, finished):
    new = tmp_path / "new"
    assert "no checkpoint 5" in train(new, f"--config.init_from={finished}@5").error
    assert "train there first" in train(new, f"--config.init_from={tmp_path}/x").error
    assert train(new, "--config.steps=1").code == 0
    assert load_config(new)["init_from"] == ""


def _part(state, name):
    return {path: x for path, x in state["arrays"].items() if path.startswith(f"{name}/")}
