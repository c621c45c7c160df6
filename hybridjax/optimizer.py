"""The optimizer of a run: learning-rate schedule, AdamW or Muon, decay, clipping, freezing.

Optax sees a flat dict from parameter path to array, trained parameters only. So a frozen parameter
costs no optimizer state, and the state's names in a checkpoint are the parameters' own.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from hybridjax.config import OptimizerConfig, UserError

_SHAPES = {  # fraction of the way from the final rate (0) to the peak (1), by progress in [0, 1]
    "constant": jnp.ones_like,
    "wsd": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}


def make_optimizer(
    optimizer: OptimizerConfig, steps: int, model: nnx.Module
) -> optax.GradientTransformation:
    """The transformation that turns a gradient of `model` into its update.

    AdamW decays matrices, but no norms, biases, filters of depthwise convolutions or embedding
    tables (a row of a rare token would shrink without ever being seen). Muon orthogonalises and
    decays every matrix, the embedding and the head included; everything else is left to Adam.

    Args:
      steps: the length of the run, on which the schedule depends.
      model: arrays or shapes; only the parameters' paths and axes are read.
    """
    axes = {path: _axes(leaf) for path, leaf in _variables(model) if isinstance(leaf, nnx.Param)}
    frozen = _matching(optimizer.frozen, axes)
    trained = {path: axes[path] for path in axes if path not in frozen}
    if not trained:
        raise UserError(f"optimizer.frozen {optimizer.frozen} leaves no parameter to train")
    if optimizer.name not in _ALGORITHMS:
        known = ", ".join(_ALGORITHMS)
        raise UserError(f"optimizer.name is {optimizer.name!r}; there are {known}")
    rule = _ALGORITHMS[optimizer.name](optimizer, schedule(optimizer, steps), trained)
    if optimizer.clip > 0:
        rule = optax.chain(optax.clip_by_global_norm(optimizer.clip), rule)
    return _over_parameters(rule, trained)


# ---------------------------------------------------------------- the learning rate


def schedule(optimizer: OptimizerConfig, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The learning rate of step 0, 1, ..., `steps` - 1.

    A linear warm-up, times a shape: constant, cosine, or `wsd` (constant, then linear over the last
    `decay_fraction` of the run). The final rate is that of step `steps`.
    """
    if optimizer.schedule not in _SHAPES:
        known = ", ".join(_SHAPES)
        raise UserError(f"optimizer.schedule is {optimizer.schedule!r}; there are {known}")
    peak, final = optimizer.learning_rate, optimizer.final_learning_rate
    start = _decay_start(optimizer, steps)

    def learning_rate(step):
        warmup = jnp.minimum(1.0, (step + 1) / max(1, optimizer.warmup_steps))
        progress = jnp.clip((step - start) / max(1, steps - start), 0.0, 1.0)
        return warmup * (final + (peak - final) * _SHAPES[optimizer.schedule](progress))

    return learning_rate


def length_free(optimizer: OptimizerConfig) -> bool:
    """Whether the schedule is the same for every length of the run."""
    return optimizer.schedule == "constant"


def may_change_steps(optimizer: OptimizerConfig, old_steps: int, step: int) -> bool:
    """Whether a run of `old_steps`, resumed at `step`, may be given another length.

    It may if the steps already taken would have been the same.
    """
    undecayed = optimizer.schedule == "wsd" and step <= _decay_start(optimizer, old_steps)
    return length_free(optimizer) or undecayed


def _decay_start(optimizer: OptimizerConfig, steps: int) -> int:
    if optimizer.schedule == "wsd":
        return steps - round(optimizer.decay_fraction * steps)
    return min(optimizer.warmup_steps, steps)


# ---------------------------------------------------------------- the update rules


def _adamw(optimizer: OptimizerConfig, learning_rate: Callable, axes: Mapping):
    return optax.adamw(
        learning_rate,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask={path: _is_matrix(a) and a[0] != "vocab" for path, a in axes.items()},
    )


def _muon(optimizer: OptimizerConfig, learning_rate: Callable, axes: Mapping):
    """Muon (Jordan et al. 2024) for matrices, one by one where layers or experts are stacked."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = contrib.muon(
        learning_rate,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        muon_weight_dimension_numbers={
            path: matrix if _is_matrix(a) else None for path, a in axes.items()
        },
    )
    return _sharded_by_compiler(muon)


def _is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether it maps vectors to vectors; a depthwise convolution is one filter per channel."""
    return len(axes) >= 2 and "taps" not in axes


_ALGORITHMS = {"adamw": _adamw, "muon": _muon}


def _sharded_by_compiler(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule for explicit meshes: Newton-Schulz multiplies along sharded axes, as in `X Xᵀ`."""

    def with_result_like(f, *like):
        placed = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
        return jax.sharding.auto_axes(f, out_sharding=placed)

    def init(params):
        state = rule.init(params)
        return with_result_like(lambda state: (state,), state)(state)[0]

    def update(updates, state, params=None):
        return with_result_like(rule.update, updates, state)(updates, state, params)

    return optax.GradientTransformation(init, update)


# ---------------------------------------------------------------- parameters by path


def _variables(tree) -> list[tuple[str, nnx.Variable]]:
    """(path, variable) of each variable of a module, as `groups/0/mlp/up/kernel`."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_variable)
    return [(_name(path), leaf) for path, leaf in leaves]


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _axes(parameter: nnx.Param) -> tuple[str | None, ...]:
    """The logical axes, without that of stacked layers."""
    return parameter.get_metadata()["axes"]


def _matching(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """The paths that some glob matches, itself or as the name of a module above.

    Raises:
      UserError: a pattern that matches nothing.
    """
    matching = set()
    for pattern in patterns:
        hits = fnmatch.filter(paths, pattern) + fnmatch.filter(paths, f"{pattern}/*")
        if not hits:
            near = ", ".join(difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0))
            raise UserError(f"optimizer.frozen: {pattern!r} matches no parameter; near are {near}")
        matching.update(hits)
    return matching


def _over_parameters(
    rule: optax.GradientTransformation, trained: Iterable[str]
) -> optax.GradientTransformation:
    """The rule on `{path: array}`, made to take whole modules; other leaves keep their value."""

    def select(module):
        return {path: leaf[...] for path, leaf in _variables(module) if path in trained}

    def init(params):
        return rule.init(select(params))

    def update(updates, state, params):
        new, state = rule.update(select(updates), state, select(params))

        def fill(path, leaf):
            name = _name(path)
            return leaf.replace(new[name] if name in new else jnp.zeros_like(leaf[...]))

        return jax.tree.map_with_path(fill, params, is_leaf=_is_variable), state

    return optax.GradientTransformation(init, update)
