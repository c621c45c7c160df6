"""Whole runs of `hybridjax.train`: resuming, stopping, starting from elsewhere, accumulation."""

import os
import shutil
import signal

import numpy as np
import pytest
from commands import MICRO, each_batch, end_state, files, train

from hybridjax.workdir import hold, load_config

pytest_plugins = ("commands",)
pytestmark = pytest.mark.usefixtures("shared_compilation")
CONSTANT, EMBEDDING = f"{MICRO}:constant", "model/embedding/table"


def at(step, act):
    """Does something when a run has drawn the batch of a step."""
    return each_batch(lambda number, batch: act(batch) if number == step else None)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", (1, pytest.param(5, marks=pytest.mark.slow)))
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, finished, step):
    with at(step, lambda batch: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = train(tmp_path)
    assert stopped.code == 0 and stopped.err == ""
    assert f"stopped at step {step}; the same command resumes" in stopped.out
    assert end_state(tmp_path)["step"] == step
    done = train(tmp_path)
    assert done.code == 0 and f"resumed at step {step}" in done.out
    assert end_state(tmp_path) == end_state(finished)


@pytest.mark.slow
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


def test_two_processes_do_not_train_in_one_directory(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with hold(tmp_path):
        before = files(tmp_path)
        assert f"another process is at work in {tmp_path}" in train(tmp_path).error
        assert files(tmp_path) == before
    assert train(tmp_path).code == 0


def test_what_may_change_may_change(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    changed = ("log_every=5", "checkpoint.keep=3", "evaluation.every=9", "mesh.data=1")
    done = train(tmp_path, *(f"--config.{setting}" for setting in changed))
    assert done.code == 0 and "resumed at step 7" in done.out
    assert end_state(tmp_path) == end_state(finished)
    assert load_config(tmp_path)["checkpoint"]["keep"] == 3


def test_the_length_may_not_change_under_a_schedule_that_used_it(finished):
    before = files(finished)
    done = train(finished, "--config.steps=20")
    assert "steps was 7 and is 20: the wsd schedule" in done.error
    assert files(finished) == before


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, finished):
    with at(5, lambda batch: batch["loss_weights"].fill(np.nan)):
        done = train(tmp_path)
    assert "the loss is nan at step 5; the last good checkpoint is at step 3" in done.error
    assert end_state(tmp_path)["step"] == 3
    assert train(tmp_path).code == 0
    assert end_state(tmp_path) == end_state(finished)


@pytest.mark.parametrize(
    "every, fault",
    (
        pytest.param(3, "the loss is nan at step 2", id="loss", marks=pytest.mark.slow),
        pytest.param(1, "the update of step 1 is not finite", id="update"),
    ),
)
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, every, fault):
    rate = "--config.optimizer.learning_rate=1e39"  # infinite in f32
    done = train(tmp_path, rate, f"--config.checkpoint.every={every}")
    assert f"{fault}; there is no checkpoint: lower the learning rate" in done.error
    assert not list((tmp_path / "checkpoints").iterdir())


# ---------------------------------------------------------------- where a run starts


@pytest.mark.slow
def test_own_checkpoint_before_another_run_before_scratch(tmp_path, finished):
    """The embedding is frozen in this preset, so it shows where the run came from."""
    source, new = tmp_path / "so@urce", tmp_path / "new"
    shutil.copytree(finished, source)

    def start(init_from, steps):
        settings = (f"--config.init_from={init_from}", f"--config.steps={steps}")
        done = train(new, *settings, config=CONSTANT)
        assert done.code == 0, done
        return done.out, end_state(new)["arrays"][EMBEDDING]

    scratch = start("", 1)[1]
    shutil.rmtree(new)
    older = start(f"{source}@6", 1)[1]
    shutil.rmtree(new)
    newest = start(source, 1)[1]
    assert newest == end_state(finished)["arrays"][EMBEDDING]
    assert len({scratch, older, newest}) == 3
    shutil.rmtree(source)  # never looked at again
    out, own = start(source, 2)  # a constant rate: the length may change
    assert "resumed at step 1" in out and own == newest


def test_a_wrong_source_can_be_corrected(tmp_path, finished):
    new = tmp_path / "new"
    assert "no checkpoint 5" in train(new, f"--config.init_from={finished}@5").error
    assert "train there first" in train(new, f"--config.init_from={tmp_path}/x").error
    assert train(new).code == 0
    assert load_config(new)["init_from"] == ""
