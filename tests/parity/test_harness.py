"""Tasks of lm-evaluation-harness that are files, asked of a small model without a network."""

import json
import math
import pathlib
from unittest import mock

import numpy as np
import pytest
from commands import run as run_command
from micro import get_config
from test_likelihood import alone, greedy, small_model

from hybridjax import workdir
from hybridjax.config import typed
from hybridjax.data.tokenizer import ByteTokenizer
from hybridjax.workdir import Run

pytest.importorskip("lm_eval", reason="needs the eval extra: lm-eval")

pytestmark = pytest.mark.parity

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{rest}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
GENERATION = """
output_type: generate_until
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write(folder: pathlib.Path, name: str, rest: str, documents: list[dict]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    text = TASK.format(name=name, data=data, cache=folder / "cache", rest=rest)
    (folder / f"{name}.yaml").write_text(text)


def measured(folder, model, tasks, *flags) -> dict:
    """What the command writes for a run that has this model."""
    run = Run(folder, typed(get_config()), model, ByteTokenizer(), step=7, metadata={})
    with mock.patch.object(workdir, "open_run", return_value=run):
        line = (f"--workdir={folder}", f"--harness={tasks}", f"--task_folder={folder}", *flags)
        done = run_command("evaluate", *line)
    assert done.code == 0, done
    assert all(name in done.out for name in tasks.split(","))
    return json.loads((folder / "harness.json").read_text())


def ids(text):
    return list(text.encode())


def test_tasks_of_files(folder, model):
    """Each against the model's own logits."""
    questions = ["One and one is", "The sky is", "Who", "A longer question, of some words, asks"]
    choices = [" two", " blue", " green", " who knows"]
    best = [max(choices, key=lambda c: alone(model, (ids(q), ids(c)))[0]) for q in questions]
    answers = [choices.index(c) for c in best]
    answers[0] = (answers[0] + 1) % 4  # one of four is wrong
    documents = [
        dict(question=q, choices=choices, answer=a) for q, a in zip(questions, answers)
    ]
    write(folder, "choice", CHOICE, documents)

    written = [greedy(model, ids(q), 6).split("e")[0] for q in questions]
    documents = [dict(question=q, answer=a) for q, a in zip(questions, [*written[:3], "none"])]
    write(folder, "generation", GENERATION, documents)
    write(folder, "rolling", ROLLING, [dict(question="", answer=q) for q in questions])

    results = measured(folder, model, "choice,generation,rolling")
    assert results["step"] == 7 and results["n-samples"]["choice"]["effective"] == 4
    found = results["results"]
    assert found["choice"]["acc,none"] == 0.75
    assert found["generation"]["exact_match,none"] == 0.75
    nats = sum(alone(model, ([0], ids(q)))[0] for q in questions)
    bits = -nats / math.log(2) / sum(len(ids(q)) for q in questions)
    np.testing.assert_allclose(found["rolling"]["bits_per_byte,none"], bits, rtol=1e-5)
    limited = measured(folder, model, "choice", "--limit=2")
    assert limited["results"]["choice"]["acc,none"] == 0.5


def test_faults_are_one_line(folder, model):
    write(folder, "choice", CHOICE, [])
    (folder / "choice.jsonl").unlink()
    run = Run(folder, typed(get_config()), model, ByteTokenizer(), step=7, metadata={})
    with mock.patch.object(workdir, "open_run", return_value=run):
        for task, line in (
            ("choice", "cannot load the data of choice: Unable to find"),
            ("chioce", "there is no task 'chioce': `lm-eval ls tasks` lists"),
        ):
            flags = (f"--workdir={folder}", f"--harness={task}", f"--task_folder={folder}")
            assert line in run_command("evaluate", *flags).error


def test_layers_are_selected_by_tasks(folder):
    """Every model of the sweep is asked: a choice of one is always right, a number never written.
    What no task replaces is measured as before."""
    write(folder, "choice", CHOICE, [dict(question="So", choices=[" it is"], answer=0)])
    write(folder, "generation", GENERATION, [dict(question="So", answer="123456789")])
    config = pathlib.Path(__file__).parents[1] / "halo" / "micro_halo.py"
    flags = [f"--config={config}:micro", f"--workdir={folder}/run"]
    flags += [f"--config.select.task_folder={folder}"]
    flags += ["--config.select.recall=('generation',)", "--config.select.commonsense=('choice',)"]
    done = run_command("search", *flags)
    assert done.code == 0, done
    models = json.loads((folder / "run" / "select" / "scores.json").read_text())["models"]
    assert len(models) == 6
    assert {(m["recall"], m["commonsense"]) for m in models.values()} == {(0.0, 1.0)}
    # Not always zero: the teacher and its copy are compiled as two programs.
    assert abs(models["teacher"]["kl"]) < 1e-6 < 1e-4 < models["all linear"]["kl"]
