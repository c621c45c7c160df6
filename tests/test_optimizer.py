import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from hybridjax.config import MeshConfig, OptimizerConfig, UserError
from hybridjax.optimizer import length_free, make_optimizer, may_change_steps, schedule
from hybridjax.sharding import MESH_AXES, make_mesh, place_parameters

LAYERS = 3


class Layer(nnx.Module):
    def __init__(self, key, width):
        self.up = nnx.Param(jax.random.normal(key, (width, 2 * width)), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(width), axes=("embed",))


class Model(nnx.Module):
    def __init__(self, key, width=16):
        keys = jax.random.split(key, LAYERS)
        table = jax.random.normal(key, (24, width))
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.groups = nnx.List([jax.vmap(lambda k: Layer(k, width))(keys)])


def normal_like(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), model)


def by_path(module):
    leaves = jax.tree.leaves_with_path(module)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


EMBEDDING, UP, SCALE = "embedding/value", "groups/0/up/value", "groups/0/scale/value"


@pytest.fixture(scope="module")
def model():
    return jax.jit(Model)(jax.random.key(0))


# ---------------------------------------------------------------- schedules


def config(**fields):
    return OptimizerConfig(learning_rate=1.0, **fields)


SCHEDULES = {
    "constant": (config(schedule="constant"), 10, {0: 1.0, 9: 1.0, 1000: 1.0}),
    "warm-up": (config(schedule="constant", warmup_steps=4), 10, {0: 0.25, 2: 0.75, 3: 1.0}),
    "wsd": (
        config(schedule="wsd", final_learning_rate=0.2, warmup_steps=2, decay_fraction=0.4),
        10,
        {0: 0.5, 1: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2, 11: 0.2},
    ),
    "wsd without decay": (config(schedule="wsd", decay_fraction=0.0), 10, {0: 1.0, 10: 1.0}),
    "cosine": (
        config(schedule="cosine", final_learning_rate=0.5, warmup_steps=2),
        10,
        {0: 0.5, 2: 1.0, 4: 0.75 + 0.25 * 2**-0.5, 6: 0.75, 10: 0.5},
    ),
    "run shorter than its warm-up": (config(schedule="wsd", warmup_steps=100), 1, {0: 0.01}),
}


@pytest.mark.parametrize("optimizer, steps, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_has_the_values_computed_by_hand(optimizer, steps, expected):
    rate = schedule(optimizer, steps)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)
    traced = jax.jit(rate)(jnp.array(list(expected)))
    np.testing.assert_allclose(traced, list(expected.values()), atol=1e-6)


@pytest.mark.parametrize(
    "name, step, allowed",
    [("constant", 99, True), ("wsd", 60, True), ("wsd", 61, False), ("cosine", 0, False)],
)
def test_length_may_change_while_past_steps_would_have_been_the_same(name, step, allowed):
    optimizer = config(schedule=name, decay_fraction=0.4, warmup_steps=5)
    assert may_change_steps(optimizer, 100, step) is allowed
    assert length_free(optimizer) is (name == "constant")
    if allowed:
        taken = jnp.arange(step)
        np.testing.assert_array_equal(
            schedule(optimizer, 100)(taken), schedule(optimizer, 200)(taken)
        )


# ---------------------------------------------------------------- update rules


def test_adamw_decays_matrices_only(model):
    tx = make_optimizer(config(schedule="constant", weight_decay=0.1), 10, model)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
    updates, values = by_path(updates), by_path(model)
    np.testing.assert_allclose(updates[UP], -0.1 * values[UP], rtol=1e-6)
    assert not updates[SCALE].any() and not updates[EMBEDDING].any()


def test_learning_rate_follows_the_schedule(model):
    def sizes(warmup_steps):
        optimizer = config(name="muon", schedule="constant", warmup_steps=warmup_steps)
        tx, gradient = make_optimizer(optimizer, 10, model), normal_like(model, 1)
        update, state, norms = jax.jit(tx.update), tx.init(model), []
        for _ in range(6):
            updates, state = update(gradient, state, model)
            norms.append(float(optax.tree.norm(updates)))
        return np.array(norms)

    np.testing.assert_allclose(sizes(4) / sizes(0), [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-5)


def test_clip_bounds_the_norm_over_trained_parameters_only(model):
    optimizer = config(schedule="constant", clip=0.5, b1=0.0, frozen=("embedding",))
    tx, gradient = make_optimizer(optimizer, 10, model), normal_like(model, 1)
    _, state = jax.jit(tx.update)(gradient, tx.init(model), model)
    assert float(optax.tree.norm(optax.tree.get(state, "mu"))) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    "name, frozen, paths",
    [
        ("adamw", ("embedding",), {EMBEDDING}),
        ("muon", ("embed*",), {EMBEDDING}),
        ("adamw", ("groups/0/*",), {UP, SCALE}),
        ("adamw", ("groups",), {UP, SCALE}),
        ("muon", ("*/scale", "embedding"), {SCALE, EMBEDDING}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(sorted(value)),
)
def test_frozen_parameters_neither_move_nor_have_state(model, name, frozen, paths):
    optimizer = config(name=name, weight_decay=0.1, frozen=frozen)
    tx = make_optimizer(optimizer, 10, model)
    state = tx.init(model)
    values = by_path(model)
    state_sizes = {x.size for x in jax.tree.leaves(state)}
    assert not state_sizes & {values[path].size for path in paths}
    updates, _ = jax.jit(tx.update)(normal_like(model, 1), state, model)
    moved = by_path(optax.apply_updates(model, updates))
    same = {path for path in values if np.array_equal(moved[path], values[path])}
    assert same == paths


FAULTS = {
    "pattern without a match": (dict(frozen=("embeding*",)), r"'embeding\*' matches no.*embedding"),
    "nothing trained": (dict(frozen=("*",)), "no parameter to train"),
    "unknown optimizer": (dict(name="sgd"), "'sgd'; there are adamw, muon"),
    "unknown schedule": (dict(schedule="step"), "'step'; there are constant, wsd, cosine"),
}


@pytest.mark.parametrize("fields, message", FAULTS.values(), ids=FAULTS)
def test_faults_name_the_value_and_the_choices(model, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        make_optimizer(config(**fields), 10, model)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- Muon


def test_muon_orthogonalises_each_layer_of_a_stacked_kernel(model):
    tx = make_optimizer(config(name="muon", schedule="constant"), 10, model)
    gradient = normal_like(model, 1)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(model), model)
    updates, gradient = by_path(updates), by_path(gradient)
    for name in (UP, EMBEDDING):
        before = np.linalg.svd(gradient[name], compute_uv=False)
        after = np.linalg.svd(updates[name], compute_uv=False)
        assert (before.max(-1) / before.min(-1) > 3).all()
        assert (after.max(-1) / after.min(-1) < 1.8).all()
    # Vectors are Adam's: all entries of the first update have one size.
    np.testing.assert_allclose(np.abs(updates[SCALE]), np.abs(updates[SCALE]).max(), rtol=1e-4)
    np.testing.assert_array_equal(np.sign(updates[SCALE]), -np.sign(gradient[SCALE]))


def test_muon_of_a_stack_is_muon_of_its_layers(model):
    optimizer = config(name="muon", schedule="constant", clip=0.0)
    gradient = normal_like(model, 1)

    @jax.jit
    def update(model, gradient):
        tx = make_optimizer(optimizer, 10, model)
        return tx.update(gradient, tx.init(model), model)[0]

    stacked = update(model, gradient).groups[0]
    for i in range(LAYERS):
        layer = lambda m, i=i: jax.tree.map(lambda x: x[i], m.groups[0])
        alone = update(layer(model), layer(gradient))
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_allclose(a, b[i], atol=2e-5)  # Newton-Schulz amplifies rounding


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_filters_of_a_depthwise_convolution_are_adams_and_do_not_decay(name):
    """Muon would give all of a kernel's singular values one size: its rows are no linear map."""

    class Filters(nnx.Module):
        def __init__(self, key):
            self.up = nnx.Param(jax.random.normal(key, (8, 4)), axes=("embed", "mlp"))
            self.filters = nnx.Param(jax.random.normal(key, (8, 4)), axes=("heads", "taps"))

    model = Filters(jax.random.key(0))
    optimizer = config(name=name, schedule="constant", weight_decay=0.1, clip=0.0)
    tx = make_optimizer(optimizer, 10, model)
    still, _ = tx.update(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
    assert by_path(still)["up/value"].any() and not by_path(still)["filters/value"].any()
    gradient = normal_like(model, 1)
    updates, _ = tx.update(gradient, tx.init(model), model)
    filters = by_path(updates)["filters/value"]
    # Adam's: all entries of the first update have one size.
    np.testing.assert_allclose(np.abs(filters), np.abs(filters).max(), rtol=1e-4)
    np.testing.assert_array_equal(np.sign(filters), -np.sign(by_path(gradient)["filters/value"]))


# ---------------------------------------------------------------- meshes


def three_steps(optimizer, key):
    def init(key):
        model = place_parameters(Model(key))
        return model, make_optimizer(optimizer, 10, model).init(model)

    @jax.jit
    def step(model, state):
        gradient = jax.grad(lambda m: sum(jnp.sum(x**4) for x in jax.tree.leaves(m)))(model)
        updates, state = make_optimizer(optimizer, 10, model).update(gradient, state, model)
        return optax.apply_updates(model, updates), state

    model, state = first = jax.jit(init)(key)
    for _ in range(3):
        model, state = step(model, state)
    assert step._cache_size() == 1
    assert [x.sharding for x in jax.tree.leaves((model, state))] == [
        x.sharding for x in jax.tree.leaves(first)
    ]
    return by_path(model)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_updates_are_the_unsharded_ones_and_compile_once(name):
    optimizer = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.1)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        sharded = three_steps(optimizer, jax.random.key(0))
    for path, value in three_steps(optimizer, jax.random.key(0)).items():
        np.testing.assert_allclose(sharded[path], value, atol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_update_type_checks_for_256_devices(name):
    optimizer = OptimizerConfig(name=name)

    def update():
        model = place_parameters(Model(jax.random.key(0), width=128))
        tx = make_optimizer(optimizer, 10, model)
        return model, tx.update(model, tx.init(model), model)[0]

    mesh = AbstractMesh((1, 64, 4, 1), MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        model, updates = jax.eval_shape(update)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding.spec, updates)) == jax.tree.leaves(
        jax.tree.map(lambda x: x.sharding.spec, model)
    )
