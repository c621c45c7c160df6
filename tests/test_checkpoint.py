import dataclasses
import functools
import glob
import logging
import os
import signal
import subprocess
import sys
import textwrap

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybridjax.checkpoint import Checkpoints, restore_model, update_metadata
from hybridjax.config import MeshConfig, OptimizerConfig, UserError
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import make_mesh, place_parameters
from hybridjax.workdir import claim, load_config


class Layer(nnx.Module):
    def __init__(self, key):
        self.up = nnx.Param(jax.random.normal(key, (16, 8)), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(16), axes=("embed",))


class Model(nnx.Module):
    def __init__(self, key):
        self.embedding = nnx.Param(jax.random.normal(key, (24, 16)), axes=("vocab", "embed"))
        self.groups = nnx.List([jax.vmap(Layer)(jax.random.split(key, 3))])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array
    model: Model
    opt_state: object


def init(key, optimizer="muon"):
    """A state whose moments are not zero."""
    model = place_parameters(Model(key))
    tx = make_optimizer(OptimizerConfig(name=optimizer), 10, model)
    updates, opt_state = tx.update(model, tx.init(model), model)
    return TrainState(jnp.int32(1), optax.apply_updates(model, updates), opt_state)


@pytest.fixture(scope="module")
def state():
    return jax.jit(init)(jax.random.key(0))


def numbers():
    return iter(grain.MapDataset.range(100).shuffle(seed=0).repeat().to_iter_dataset())


def small(step):
    return {"model": {"w": jnp.arange(5.0) + step}, "step": jnp.int32(step)}


def bits(tree):
    def of(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return [of(x) for x in jax.tree.leaves(tree)]


def save_all(workdir, steps, **options):
    checkpoints = Checkpoints(workdir, **options)
    for step in steps:
        checkpoints.save(step, small(step))
    checkpoints.close()


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


def flip_bit(path):
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        content[len(content) // 2] ^= 1
        file.seek(0)
        file.write(content)


# ---------------------------------------------------------------- round trips


def test_state_data_and_metadata_come_back_bit_for_bit(tmp_path, state):
    checkpoints, data = Checkpoints(tmp_path), numbers()
    seen = [next(data) for _ in range(3)]
    checkpoints.save(7, state, data, {"logit_base": 64.0, "metrics": {"loss": float("nan")}})
    following = [next(data) for _ in range(3)]  # the save goes on in the background
    checkpoints.close()

    abstract, again = jax.eval_shape(init, jax.random.key(0)), numbers()
    restored, step, metadata = Checkpoints(tmp_path).restore(abstract, again)
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert step == 7 and metadata["logit_base"] == 64.0
    assert [next(again) for _ in range(3)] == following != seen


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    words = np.random.default_rng(0).integers(0, 2**16, 64, dtype=np.uint16)
    state = {
        "arrays": {
            "bf16": jnp.asarray(words).view(jnp.bfloat16),  # NaNs with payloads among them
            "f16": jnp.asarray(words).view(jnp.float16),
            "i8": jnp.arange(-4, 4, dtype=jnp.int8),
            "bool": jnp.array([True, False]),
            "scalar": jnp.float32(-0.0),
        },
        "key": jax.random.key(3),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    restored, _, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert bits(restored) == bits(state)


def test_restores_to_another_mesh_and_to_one_device(tmp_path):
    adamw = functools.partial(init, optimizer="adamw")
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        saved = jax.jit(adamw)(jax.random.key(0))
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, saved)
        checkpoints.close()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        abstract = jax.eval_shape(adamw, jax.random.key(0))
        restored, _, _ = Checkpoints(tmp_path).restore(abstract)
    for x, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert jax.typeof(x).sharding.spec == (wanted.sharding.spec if wanted.sharding else P())
        assert x.sharding.num_devices == 8
    assert bits(restored) == bits(saved)
    model, _, _ = restore_model(tmp_path, jax.eval_shape(adamw, jax.random.key(0)).model)
    assert bits(model) == bits(saved.model)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(model))


def test_the_model_alone_needs_no_optimizer(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, metadata={"logit_base": 2.0})
    checkpoints.close()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model, step, metadata = restore_model(tmp_path, jax.eval_shape(Model, jax.random.key(0)))
    assert bits(model) == bits(state.model)
    assert (step, metadata) == (1, {"logit_base": 2.0, "config": None})
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_metadata_may_be_added_later(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), metadata={"a": 1, "b": 1})
    checkpoints.wait()
    update_metadata(tmp_path, 1, {"b": 2})
    update_metadata(tmp_path, 1, {"c": 3})
    assert checkpoints.restore(small(0))[2] == {"a": 1, "b": 2, "c": 3, "config": None}
    again = Checkpoints(tmp_path)
    again.save(1, small(1), metadata={"a": 5})  # the same step in another life of the run
    assert again.restore(small(0))[2] == {"a": 5, "config": None}


def test_another_shape_is_named(tmp_path):
    save_all(tmp_path, [1, 2])
    wanted = {"model": {"w": jnp.zeros(6)}, "step": jnp.int32(0)}
    with pytest.raises(UserError, match=r"model/w is \(5,\) there and \(6,\) here"):
        Checkpoints(tmp_path).restore(wanted)
    with pytest.raises(UserError, match=r"model/v is absent there and \(5,\) here"):
        restore_model(tmp_path, {"v": jnp.zeros(5)})
    assert Checkpoints(tmp_path).steps == [1, 2]


def test_a_checkpoint_knows_the_configuration_it_was_trained_with(tmp_path):
    claim(tmp_path, {"steps": 1})
    save_all(tmp_path, [1])
    claim(tmp_path, {"steps": 2}, allowed=("steps",))
    assert Checkpoints(tmp_path).restore(small(0))[2]["config"] == {"steps": 1}


# ---------------------------------------------------------------- which ones are kept


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 4.0}


@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(keep=2), [5, 6]),
        (dict(keep=2, best="loss"), [2, 5, 6]),
        (dict(keep=1, best="loss", higher_is_better=True), [6]),
        (dict(keep=1, best="no such metric"), [6]),
    ],
    ids=str,
)
def test_the_newest_and_the_best_are_kept(tmp_path, options, kept):
    checkpoints = Checkpoints(tmp_path, **options)
    for step, loss in LOSSES.items():
        if step == 4:  # what is best is remembered across starts
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, **options)
        metadata = {} if loss is None else {"metrics": {"loss": loss}}
        checkpoints.save(step, small(step), metadata=metadata)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps == kept
    for step in kept:
        assert Checkpoints(tmp_path).restore(small(0), step=step)[0]["model"]["w"][0] == step


def test_saving_the_restored_step_again_does_nothing(tmp_path):
    save_all(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(small(0))
    checkpoints.save(1, small(99))
    assert checkpoints.restore(small(0))[0]["model"]["w"][0] == 1


# ---------------------------------------------------------------- damage


def files(workdir, step):
    found = glob.glob(f"{workdir}/checkpoints/{step}/**", recursive=True)
    return [path for path in found if os.path.isfile(path)]


def largest(workdir, step):
    return max(files(workdir, step), key=os.path.getsize)


DAMAGE = {
    "all files cut": lambda w: [truncate(path) for path in files(w, 3)],
    "largest file cut": lambda w: truncate(largest(w, 3)),
    "a bit flipped": lambda w: flip_bit(largest(w, 3)),
    "metadata cut": lambda w: truncate(f"{w}/checkpoints/3/_CHECKPOINT_METADATA"),
    "everything gone": lambda w: [os.remove(path) for path in files(w, 3)],
}
USUAL = ("a bit flipped",)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(f, id=name, marks=() if name in USUAL else pytest.mark.slow)
        for name, f in DAMAGE.items()
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(tmp_path, damage, caplog, capfd):
    values = jax.random.normal(jax.random.key(0), (300, 100))
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (1, 2, 3):
        checkpoints.save(step, {"model": {"w": values + step}})
    checkpoints.close()
    damage(tmp_path)
    capfd.readouterr()
    wanted = {"model": {"w": values}}
    assert restore_model(tmp_path, wanted["model"])[1] == 2
    caplog.clear()
    checkpoints = Checkpoints(tmp_path, keep=1)
    with caplog.at_level(logging.WARNING):
        restored, step, _ = checkpoints.restore(wanted)
    assert step == 2 and bits(restored) == bits({"model": {"w": values + 2}})
    assert len(caplog.messages) == 1 and "checkpoint 3" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert "Traceback" not in capfd.readouterr().err
    # The run goes on: the damaged one neither comes back nor counts as the newest.
    checkpoints.save(3, {"model": {"w": values + 4}})
    checkpoints.close()
    restored, step, _ = Checkpoints(tmp_path).restore(wanted)
    assert step == 3 and bits(restored) == bits({"model": {"w": values + 4}})


def test_nothing_is_moved_when_no_checkpoint_loads(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(largest(tmp_path, step))
    with pytest.raises(UserError, match="no checkpoint that loads"):
        Checkpoints(tmp_path).restore(small(0))
    with pytest.raises(UserError, match="no checkpoint that loads"):
        restore_model(tmp_path, small(0)["model"])
    assert Checkpoints(tmp_path).steps == [1, 2]


def test_a_step_that_is_not_there_is_a_user_error(tmp_path):
    save_all(tmp_path, [1, 2])
    with pytest.raises(UserError, match=r"no checkpoint 5 in .*there are \[1, 2\]"):
        Checkpoints(tmp_path).restore(small(0), step=5)
    with pytest.raises(UserError, match="no checkpoint in .*/empty"):
        restore_model(tmp_path / "empty", small(0)["model"])
    assert not (tmp_path / "empty").exists()


# ---------------------------------------------------------------- failing and killed saves

PRELUDE = """
    import os, resource, signal, sys, time
    import jax, numpy as np
    from hybridjax.checkpoint import Checkpoints
    from hybridjax.config import UserError
    def state(step):
        rng = np.random.default_rng(step)
        return {"model": {"w": jax.numpy.asarray(rng.normal(size=(2000, 1000)), "float32")}}
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, state(1)); checkpoints.wait()
"""


def run(script, workdir):
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code, workdir], capture_output=True, text=True, timeout=120
    )


def large_state(step):
    w = np.random.default_rng(step).normal(size=(2000, 1000)).astype("float32")
    return {"model": {"w": jnp.asarray(w)}}


def test_a_failed_save_is_reported_and_leaves_the_one_before(tmp_path):
    script = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        for call in (lambda: checkpoints.save(3, state(3)), checkpoints.wait):
            checkpoints.save(2, state(2))
            try:
                call()
            except UserError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(checkpoints.restore(state(0))[1])
        checkpoints.save(4, state(4)); checkpoints.close()
        print(Checkpoints(sys.argv[1]).steps)
    """
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    at_save, at_wait, restored, steps = done.stdout.splitlines()
    for line in (at_save, at_wait):
        assert line.startswith("checkpoint 2 could not be written") and "File too large" in line
    assert restored == "1" and steps == "[1, 4]"
    assert "Traceback" not in done.stderr


def test_a_save_that_is_killed_never_shows(tmp_path):
    script = """
        checkpoints.save(2, state(2))
        while not any("2.orbax" in name for name in os.listdir(sys.argv[1] + "/checkpoints")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(script, tmp_path).returncode == -signal.SIGKILL
    names = os.listdir(tmp_path / "checkpoints")
    assert len(names) == 2 and "2" not in names  # the kill did come in the middle
    assert restore_model(tmp_path, large_state(0)["model"])[1] == 1
    checkpoints = Checkpoints(tmp_path)
    restored, step, _ = checkpoints.restore(large_state(0))
    assert step == 1 and bits(restored) == bits(large_state(1))
    checkpoints.save(2, large_state(2))
    assert bits(checkpoints.restore(large_state(0))[0]) == bits(large_state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]  # nothing is left over


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use .*choose another workdir"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match="cannot use .*choose another workdir"):
        claim(tmp_path / "file", {"a": 1})


# ---------------------------------------------------------------- the work directory's identity

CONFIG = {"steps": 10, "mesh": {"data": 1}, "model": {"layers": "LA", "sizes": (1, 2)}, "empty": {}}


def changed(**fields):
    return CONFIG | fields


CLAIMS = {
    "the same": (CONFIG, None),
    "allowed": (changed(steps=20, mesh={"data": 8, "fsdp": 2}), None),
    "a value": (changed(model={"layers": "AA", "sizes": (1, 2)}), "model.layers: 'LA' .*'AA'"),
    "a list": (changed(model={"layers": "LA", "sizes": (1, 3)}), r"sizes: \[1, 2\] .*\[1, 3\]"),
    "a new key": (changed(z_loss=0.1), "z_loss: 'not set' there, 0.1 here"),
    "a lost key": (
        {k: CONFIG[k] for k in ("steps", "mesh", "model")},
        "empty: {} there, 'not set'",
    ),
    "many": (changed(**{f"k{i}": i for i in range(8)}), "k4: 'not set' there, 4 here; and 3 more"),
}


@pytest.mark.parametrize("config, fault", CLAIMS.values(), ids=CLAIMS)
def test_a_work_directory_belongs_to_one_configuration(tmp_path, config, fault):
    allowed = ("steps", "mesh.*")
    assert claim(tmp_path / "new", CONFIG, allowed) is None
    on_file = load_config(tmp_path / "new")
    if fault is None:
        assert claim(tmp_path / "new", config, allowed) == on_file
        assert load_config(tmp_path / "new")["steps"] == config["steps"]
    else:
        with pytest.raises(UserError, match=fault) as caught:
            claim(tmp_path / "new", config, allowed)
        assert "\n" not in str(caught.value)
        assert load_config(tmp_path / "new") == on_file
    assert os.listdir(tmp_path / "new") == ["config.json"]


def test_a_directory_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=f"no hybridjax run in {tmp_path}"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"torn')
    for read in (load_config, lambda path: claim(path, CONFIG)):
        with pytest.raises(UserError, match="config.json"):
            read(tmp_path)
