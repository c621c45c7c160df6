"""Whole conversions by the command: resuming, stages on their own, faults."""

import itertools
import json
import os
import pathlib
import shutil
import signal

import pytest
import tokenizers
from commands import each_batch, end_state, run, use_compiled

from hybridjax.config import typed
from hybridjax.halo.config import HaloConfig
from hybridjax.workdir import open_run

pytest_plugins = ("commands",)
pytestmark = pytest.mark.usefixtures("shared_compilation")
CONFIG = pathlib.Path(__file__).parent / "micro_halo.py"
STEPS = 5  # of each of the four stages that train


def distill(workdir, *settings, config=f"{CONFIG}:micro", command="distill"):
    return run(command, f"--config={config}", f"--workdir={workdir}", *settings)


@pytest.fixture(scope="session")
def converted(tmp_path_factory, compiled) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("converted")
    with use_compiled(compiled):
        done = distill(workdir)
    assert done.code == 0, done
    return workdir


def trained_states(workdir):
    return {name: end_state(workdir / name) for name in ("align", "distill", "finetune")}


def scores(workdir):
    return json.loads((workdir / "select" / "scores.json").read_text())


def test_a_conversion_leaves_a_run_and_a_picture(converted):
    layers = scores(converted)["layers"]
    assert sorted(layers) == ["A", "L"]  # one of two is kept
    results = json.loads((converted / "halo.json").read_text())
    assert results["layers"] == layers
    assert list(results["models"]) == ["teacher", "distilled", "finetuned"]
    assert (converted / "halo.png").stat().st_size > 10_000
    student = open_run(converted / "finetune")
    assert student.config.model.layers == layers and student.step == STEPS


@pytest.mark.slow
def test_a_stopped_conversion_resumes_bit_for_bit(tmp_path, converted):
    """In the middle of the alignment, then of the distillation."""
    for stage in ("teacher", "transfer"):
        shutil.copytree(converted / stage, tmp_path / stage)
    for draw, stage, step in ((2, "align", 2), (STEPS - 2 + 4, "distill", 4)):
        drawn = itertools.count(1)

        def stop(number, batch, draw=draw, drawn=drawn):
            if next(drawn) == draw:
                os.kill(os.getpid(), signal.SIGTERM)

        with each_batch(stop):
            done = distill(tmp_path)
        assert done.code == 0 and f"stopped at step {step}; the same" in done.out
        assert end_state(tmp_path / stage)["step"] == step
    assert distill(tmp_path).code == 0
    assert trained_states(tmp_path) == trained_states(converted)
    assert scores(tmp_path) == scores(converted)


def test_a_selection_goes_on_with_the_layers_that_are_left(tmp_path, converted):
    """A score that is there is not measured again; the table names every rule."""
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    whole = scores(tmp_path)
    path = tmp_path / "select" / "scores.json"
    planted = whole["models"]["linear 0"] | {"recall": 0.123}
    path.write_text(json.dumps({"models": {"linear 0": planted}}))
    done = distill(tmp_path, command="search")
    assert done.code == 0, done
    assert scores(tmp_path)["models"] == whole["models"] | {"linear 0": planted}
    assert all(rule in done.out for rule in whole["kept"]) and "0.1230" in done.out


@pytest.mark.slow
def test_layers_chosen_by_hand(tmp_path, converted):
    for stage in ("teacher", "transfer", "align"):
        shutil.copytree(converted / stage, tmp_path / stage)
    settings = ("--config.select.layers=LL", "--stages=select,distill")
    assert distill(tmp_path, *settings).code == 0
    assert open_run(tmp_path / "distill").config.model.layers == "LL"


FAULTS = {
    "stage": (["--stages=align,polish"], "there is no stage 'polish': there are transfer, align"),
    "teacher": (["--config.teacher=nowhere"], "no hybridjax run in nowhere"),
    "heads": (["--config.linear.heads=4"], "config.linear.heads is 4 and the teacher has 2"),
    "rule": (["--config.select.rule=best"], "config.select.rule is 'best': use one of halo"),
    "letters": (["--config.select.layers=LAL"], "is 'LAL': give 2 letters"),
    "clip": (["--config.align.clip=each"], "config.align.clip is 'each': use one of layer, global"),
    "too early": (["--stages=distill"], "no layers are selected"),
    "not aligned": (["--stages=select"], "stage align was not run in"),
    "setting": (["--config.align.step=3"], "no such setting as 'step'"),
}


@pytest.mark.parametrize("settings, line", FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line(tmp_path, converted, settings, line):
    shutil.copytree(converted / "teacher", tmp_path / "teacher")
    if "rule" in line or "letters" in line:
        shutil.copytree(converted / "align", tmp_path / "align")
    if not settings[0].startswith("--stages"):
        settings = [*settings, "--stages=select"]
    assert line in distill(tmp_path, *settings).error


def test_another_tokenizer_than_the_teachers_is_refused(tmp_path, converted):
    words = tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(path := tmp_path / "tokenizer.json"))
    teacher = f"--config.teacher={converted / 'teacher'}"
    done = distill(tmp_path, teacher, f"--config.data.tokenizer={path}", "--stages=transfer")
    assert f"is '{path}' and the teacher's is 'bytes', which gives other ids" in done.error


# ---------------------------------------------------------------- the shipped configs


def shipped(preset):
    from configs import halo

    return typed(halo.get_config(preset), HaloConfig)


@pytest.mark.parametrize("preset, rate", (("1.7b", 1e-4), ("4b", 5e-5), ("8b", 3e-5)))
def test_published_budgets(preset, rate):
    halo = shipped(preset)
    tokens = lambda stage: stage.steps * stage.batch_size * stage.seq_len
    stages = (halo.align, halo.distill, halo.finetune)
    assert [round(tokens(s) / 1e6) for s in stages] == [328, 983, 1049]
    assert [s.optimizer.learning_rate for s in stages] == [1e-3, rate, 1e-5]
    assert {s.optimizer.final_learning_rate for s in stages} == {1e-5}
    assert {(s.optimizer.weight_decay, s.optimizer.warmup_steps) for s in stages} == {(0.0, 50)}
    assert (halo.align.clip, halo.gates, halo.select.cap) == ("global", "fresh", 50.0)


def test_a_published_size_needs_a_teacher(tmp_path):
    done = run("distill", "--config=configs/halo.py:1.7b", f"--workdir={tmp_path}")
    assert "converts a pretrained Transformer: give --config.teacher=WORKDIR" in done.error


def test_the_linear_mixer_is_an_option():
    assert shipped("tiny,gated-deltanet").linear["type"] == "gated_deltanet"
