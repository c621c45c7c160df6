"""What a user gets wrong: one line, a non-zero exit, and nothing of an earlier run is lost."""

import re
import resource
import shutil
import time

import pytest
from commands import MICRO, Done, each_batch, end_state, files, run, train

from hybridjax.mixers.attention import Attention

pytest_plugins = ("commands",)
pytestmark = pytest.mark.usefixtures("shared_compilation")

TINY = "configs/hypenet.py:tiny"


def set_to(**values):
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


# name -> (the config file, settings, what the line says)
TRAINING = {
    "no config": (None, [], "no config: give --config="),
    "missing config file": ("configs/hypnet.py:tiny", [], "there is no config file configs/hypnet"),
    "a directory as config": ("configs", [], "there is no config file configs"),
    "unknown preset": ("configs/hypenet.py:tinny", [], "unknown preset 'tinny'; did you mean tiny"),
    "unknown variant": (f"{TINY},large", [], "unknown variant 'large'"),
    "unknown setting": (TINY, set_to(optimizer__learning_rat=1), "did you mean learning_rate"),
    "unknown section": (TINY, set_to(optimiser__name="adamw"), "did you mean optimizer"),
    "unknown setting in the argument": (f"{TINY},sead=1", [], "'sead'; did you mean seed"),
    "mistyped number": (TINY, set_to(steps="many"), "config.steps is 'many'; it must be a int"),
    "fraction of a step": (TINY, set_to(steps=1.5), "config.steps is '1.5'; it must be a int"),
    "no width": (TINY, set_to(model__width=0), "a linear map 0 -> .*: widths"),
    "no heads": (
        TINY,
        ["--config.model.blocks.L.mixers[0].heads=0"],
        "a linear map .* -> 0: widths and heads are positive",
    ),
    "mixer option": (
        TINY,
        ["--config.model.blocks.L.mixers[0].rop=False"],
        "no such setting as 'rop'; did you mean rope",
    ),
    "dtype": (TINY, set_to(model__dtype="floaty"), "dtype is 'floaty': use one of"),
    "unexpected argument": (TINY, ["steps=3"], "unexpected argument 'steps=3'"),
    "unknown flag": (TINY, ["--workdri=x"], "workdri"),
    "unknown letter": (TINY, set_to(model__layers="LXA"), "layer 1 of 'LXA' is 'X'.*legend"),
    "no layers": (TINY, set_to(model__layers=""), "config.model.layers is empty"),
    "no tokenizer": ("configs/hypenet.py:500m", [], "no tokenizer: give --config.data.tokenizer"),
    "missing tokenizer": (TINY, set_to(data__tokenizer="/none.json"), "cannot read the tokenizer"),
    "small vocabulary": (TINY, set_to(model__vocab=100), "has 256 tokens, .* vocabulary 100"),
    "no steps": (TINY, set_to(steps=0), "config.steps is 0: it must be at least 1"),
    "log never": (TINY, set_to(log_every=0), "config.log_every is 0"),
    "unaccumulable batch": (
        TINY,
        set_to(accumulate=5, batch_size=32),
        "batch_size 32 is not divisible by .* = 5",
    ),
    "two free axes": (TINY, set_to(mesh__fsdp=-1), "at most one axis may be -1"),
    "a mesh for others": (TINY, set_to(mesh__tensor=3), "'tensor': 3.* does not fit 1 devices"),
    "no devices": (TINY, set_to(mesh__data=0), "'data': 0.* does not fit 1 devices"),
    "remat": (TINY, set_to(model__remat="some"), "remat is 'some': use one of none, names"),
    "schedule": (TINY, set_to(optimizer__schedule="linear"), "schedule is 'linear'; there are"),
    "optimizer": (TINY, set_to(optimizer__name="adam"), "name is 'adam'; there are adamw, muon"),
    "packing": (TINY, set_to(data__packing="loose"), "unknown packing 'loose'"),
    "short rows": (TINY, set_to(seq_len=16), "4 facts of 5 tokens.*lengthen seq_len"),
    "no run to start from": (TINY, set_to(init_from="/none"), "no checkpoint in /none"),
    "file as workdir": (TINY, ["--workdir=README.md/run"], "cannot use .*choose another workdir"),
    "unwritable workdir": (TINY, ["--workdir=/proc/run"], "cannot use .*choose another workdir"),
}


@pytest.mark.parametrize("config, settings, line", TRAINING.values(), ids=TRAINING)
def test_a_fault_in_training_is_one_line(tmp_path, config, settings, line):
    given = [] if config is None else [f"--config={config}"]
    workdir = [] if any("--workdir" in s for s in settings) else [f"--workdir={tmp_path / 'run'}"]
    assert_says(run("train", *given, *workdir, *settings), line)
    assert not (tmp_path / "run" / "config.json").exists()  # the directory is still free


# Bodies of config files whose fault is in the legend.
LEGENDS = {
    "a reader without a publisher": (
        "config.model.blocks.A.mixers[0].type = 'test_faults:Reader'",
        "layer 1 .'A'. of 'LA' reads 'memory', which no layer below it publishes",
    ),
    "a row off the chunk grid": (
        "config.model.blocks.A.mixers[0].type = 'test_faults:Aligned'",
        "seq_len 32 is not a multiple of 24, the chunk grid of the stack",
    ),
    "a typo in an option": (
        "mixer('lightning', heads=2, head_dim=8, rop=True)",
        "lightning has no option rop; did you mean rope",
    ),
    "a missing option": ("mixer('lightning', heads=2)", "lightning needs the option head_dim"),
    "an unknown mixer": (
        "mixer('lightening', heads=2)",
        "unknown component 'lightening'; did you mean lightning",
    ),
    "a class that is not there": ("mixer('hybridjax.mixers:No')", "cannot import 'hybridjax.mix"),
}


@pytest.mark.parametrize("body, line", LEGENDS.values(), ids=LEGENDS)
def test_a_fault_in_the_legend_is_one_line(tmp_path, body, line):
    file = tmp_path / "legend.py"
    file.write_text(
        "from hybridjax.models import mixer\n"
        "import micro\n\n\n"
        f"def get_config(arg=None):\n    config = micro.get_config('micro')\n    {body}\n"
        "    return config\n"
    )
    assert_says(train(tmp_path / "run", config=file), line)


# ---------------------------------------------------------------- corpora

CORPORA = {
    "no file": ("parquet", None, "no file at .*corpus"),
    "empty": ("text", b"", "has 0 documents, none for the split 'train'"),
    "one document": ("text", b"alone", "has 1 documents, none for the split 'train'"),
    "not text": ("text", b"\xff\xfe\xff", "is not UTF-8 text"),
    "corrupt": ("parquet", b"PAR1 and so on", "is not a readable Parquet file"),
}


@pytest.mark.parametrize("type, content, line", CORPORA.values(), ids=CORPORA)
def test_a_fault_in_the_corpus_is_one_line(tmp_path, type, content, line):
    if content is not None:
        (tmp_path / "corpus").write_bytes(content)
    file = tmp_path / "config.py"
    file.write_text(
        "from hybridjax.data.sources import source\n"
        "import micro\n\n\n"
        "def get_config(arg=None):\n    config = micro.get_config('micro')\n"
        f"    config.data.sources = {{'text': source('{type}', path='{tmp_path}/corpus')}}\n"
        "    return config\n"
    )
    assert_says(train(tmp_path / "run", config=file), line)


def test_a_corrupt_row_group_found_while_training_is_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "corpus.parquet"
    table = pyarrow.table({"text": [f"document {i} " * 50 for i in range(60)]})
    parquet.write_table(table, path, row_group_size=20, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    file = tmp_path / "config.py"
    file.write_text(
        "from hybridjax.data.sources import source\n"
        "import micro\n\n\n"
        "def get_config(arg=None):\n    config = micro.get_config('micro')\n"
        f"    config.data.sources = {{'text': source('parquet', path='{path}')}}\n"
        "    return config\n"
    )
    assert_says(train(tmp_path / "run", config=file), "corpus.parquet, row group .* is corrupt")


# ---------------------------------------------------------------- an earlier run


def test_a_damaged_checkpoint_is_passed_over(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / "checkpoints/7/model/d").iterdir(), key=lambda f: f.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    done = train(tmp_path)
    assert done.code == 0 and "resumed at step 6" in done.out
    [warning] = done.warnings
    assert warning.startswith("checkpoint 7 in ") and "\n" not in warning
    assert end_state(tmp_path) == end_state(finished)


@pytest.mark.slow
def test_a_save_without_room_leaves_the_one_before(tmp_path, finished):
    def fill_disk(number, batch):
        if number == 5:
            while not (tmp_path / "checkpoints" / "3").exists():
                time.sleep(0.01)
            limit_files(20_000)

    with each_batch(fill_disk):
        try:
            done = train(tmp_path)
        finally:
            limit_files(resource.RLIM_INFINITY)
    assert_says(done, "checkpoint 6 could not be written to .*: .*File too large.* intact")
    assert end_state(tmp_path)["step"] == 3
    assert train(tmp_path).code == 0
    assert end_state(tmp_path) == end_state(finished)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


LATER = {
    "evaluate nothing": ("evaluate", [], "nothing to evaluate: give --workdir"),
    "evaluate an empty directory": ("evaluate", ["--workdir={empty}"], "no hybridjax run in"),
    "compare an empty directory": ("evaluate", ["--compare={empty}"], "is not measured"),
    "generate without a run": ("generate", [], "no model: give --workdir"),
    "generate from an empty directory": (
        "generate",
        ["--workdir={empty}", "--prompt=a"],
        "no hybridjax run in",
    ),
    "generate from nothing": ("generate", ["--workdir={run}"], "no prompt: give --prompt"),
    "an empty prompt": ("generate", ["--workdir={run}", "--prompt="], "no prompt: give --prompt"),
    "a missing prompt file": (
        "generate",
        ["--workdir={run}", "--prompt_file=/none.txt"],
        "cannot read .*/none.txt",
    ),
    "a prompt beyond the state": (
        "generate",
        ["--workdir={run}", "--prompt=abcdefgh", "--max_length=4", "--tokens=1"],
        "9 tokens .*do not fit into a state for 4",
    ),
    "a state that is none": (
        "generate",
        ["--workdir={run}", "--prompt=a", "--load_state={run}/config.json"],
        "is not a saved state",
    ),
    "a step that is not there": (
        "train",
        [f"--config={MICRO}", "--workdir={new}", "--config.init_from={run}@5"],
        "no checkpoint 5 in .* there are .6, 7.",
    ),
}


@pytest.mark.parametrize("command, args, line", LATER.values(), ids=LATER)
def test_a_fault_later_is_one_line(tmp_path, finished, command, args, line):
    before = files(finished)
    (tmp_path / "empty").mkdir()
    names = dict(run=finished, empty=tmp_path / "empty", new=tmp_path / "new")
    assert_says(run(command, *(arg.format(**names) for arg in args)), line)
    assert files(finished) == before


def test_a_run_without_checkpoints_is_one_line(tmp_path, finished):
    shutil.copy(finished / "config.json", tmp_path)
    assert_says(run("evaluate", f"--workdir={tmp_path}"), "no checkpoint in .*: train there first")
    (tmp_path / "checkpoints").mkdir()
    assert_says(run("evaluate", f"--workdir={tmp_path}"), "no checkpoint that loads in")


def test_a_torn_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"torn')
    assert_says(train(tmp_path), "cannot read .*config.json")
    assert_says(run("evaluate", f"--workdir={tmp_path}"), "cannot read .*config.json")


def assert_says(done: Done, line: str) -> None:
    assert re.search(line, done.error), done.error


# ---------------------------------------------------------------- mixers with demands


class Reader(Attention):
    reads = ("memory",)


class Aligned(Attention):
    align = 24
