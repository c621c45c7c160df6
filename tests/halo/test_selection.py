"""The rules find layers that are known to matter; the sweep compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import conversion, teacher_of

from hybridjax.data.tokenizer import load_tokenizer
from hybridjax.halo import selection
from hybridjax.halo.config import SelectConfig
from hybridjax.halo.selection import Measured, evenly, evenly_latter_half, halo_score, largest
from hybridjax.halo.transfer import choices, only_block

# ---------------------------------------------------------------- rules


def test_the_official_score_by_hand():
    recall = np.array([0.8, 0.5, 0.2, 0.8])
    commonsense = np.array([0.60, 0.58, 0.59, 0.60])
    score = halo_score(recall, commonsense)
    np.testing.assert_allclose(score, [0, 0.3 / 0.02, 50, 0], rtol=1e-6)  # 0.6 / 0.01 is capped
    papers = halo_score(recall, commonsense, eps=1e-6, cap=np.inf)
    np.testing.assert_allclose(papers, [0, 0.3 / 0.020001, 0.6 / 0.010001, 0], rtol=1e-6)


def test_planted_layers_are_found():
    """Layers 2 and 5 carry the recall. Layer 6 costs a little of both, and of text the least: its
    denominator is 0, so the official score puts it first, whatever it costs."""
    planted, depth = {2, 5}, 8
    recall = np.array([0.92, 0.93, 0.35, 0.92, 0.93, 0.50, 0.91, 0.94])
    commonsense = np.array([0.40, 0.39, 0.41, 0.38, 0.40, 0.40, 0.44, 0.43])
    models = {selection.TEACHER: Measured(0.95, 0.45, 0.0)}
    models[selection.ALL_LINEAR] = Measured(0.0, 0.2, 1.5)
    for i in range(depth):
        models[f"linear {i}"] = Measured(recall[i], commonsense[i], 0.1)
        models[f"attention {i}"] = Measured(0.1, 0.2, 1.5 - (0.4 if i in planted else 0.01 * i))
    found = selection.scores_of_rules(models, depth, 2, SelectConfig())
    halo = np.array(found["importance"]["halo"])
    assert halo[6] == 50 and 6 in found["kept"]["halo"]
    assert planted <= set(largest(halo, 3, np.zeros(depth)))
    assert set(found["kept"]["recall_drop"]) == planted
    np.testing.assert_allclose(found["importance"]["recall_drop"][2], 0.6)
    assert set(found["kept"]["kl"]) == planted
    assert found["kept"]["all_linear"] == []


def test_of_layers_at_the_cap_that_with_most_recall_is_kept():
    """Text hardly needs layers 0 and 1: the ratio says nothing more of them."""
    measured = {selection.TEACHER: Measured(0.73, 0.578, 0.0)}
    measured[selection.ALL_LINEAR] = Measured(0.05, 0.388, 1.0)
    for i, (recall, text) in enumerate([(0.51, 0.578), (0.11, 0.5804), (0.66, 0.53), (0.74, 0.41)]):
        measured |= {f"linear {i}": Measured(recall, text, 0.1),
                     f"attention {i}": Measured(0.1, 0.4, 0.9)}
    found = selection.scores_of_rules(measured, 4, 1, SelectConfig())
    assert found["importance"]["halo"][:2] == [50, 50]
    assert found["kept"]["halo"] == [1]


def test_the_lowest_of_equal_layers_is_kept():
    assert largest(np.array([0.0, 1.0, 1.0, 1.0]), 2, np.zeros(4)) == [1, 2]


@pytest.mark.parametrize(
    "depth, keep, even, latter",
    ((4, 1, (3,), (3,)), (28, 7, (3, 7, 11, 15, 19, 23, 27), (15, 17, 19, 21, 23, 25, 27)),
     (5, 2, (1, 4), (2, 4)), (2, 2, (0, 1), (1,))),
    ids=("4", "28", "5", "all"),
)  # fmt: skip
def test_layers_by_place(depth, keep, even, latter):
    assert evenly(depth, keep) == even
    assert evenly_latter_half(depth, keep) == latter


def test_the_sweep():
    assert selection.sweep(3) == {
        "teacher": (0, 0, 0), "all linear": (1, 1, 1),
        "linear 0": (1, 0, 0), "linear 1": (0, 1, 0), "linear 2": (0, 0, 1),
        "attention 0": (0, 1, 1), "attention 1": (1, 0, 1), "attention 2": (1, 1, 0),
    }  # fmt: skip


# ---------------------------------------------------------------- a real sweep


def test_a_sweep_finds_the_layer_that_was_damaged_and_compiles_once():
    """The mixer beside each layer's attention is the same attention; in layer 1 it says nothing."""
    planted, depth = 1, 3
    halo = conversion("T" * depth, linear="attention")
    teacher = teacher_of(halo)
    attention = only_block(teacher).mixers[0]
    mixers = jax.tree.map(jnp.copy, attention)
    kernel = mixers.output.kernel
    mixers.output.kernel = kernel.replace(kernel[...].at[planted].set(0.0))
    model = choices(halo, halo.model, teacher, mixers)
    questions = selection.Questions.of(
        dataclasses.replace(halo.select, examples=4, tokens=256),
        load_tokenizer("bytes"), 32, 1, {},
    )  # fmt: skip
    before = selection._measure._cache_size()
    models = {
        name: selection.measure(model, chosen, questions)
        for name, chosen in selection.sweep(depth).items()
    }
    assert selection._measure._cache_size() == before + 1
    for name, measured in models.items():
        changed = name in ("all linear", f"linear {planted}") or (
            name.startswith("attention") and name != f"attention {planted}"
        )
        assert (measured.kl > 1e-4) == changed, (name, measured)
        if not changed:
            assert measured == models["teacher"]
    kept = selection.scores_of_rules(models, depth, 1, halo.select)["kept"]
    assert kept["kl"] == [planted]
