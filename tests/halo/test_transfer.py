"""What a student inherits, and that nothing changes where nothing is replaced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import conversion, mixers_of, teacher_of
from flax import nnx

from hybridjax.config import UserError
from hybridjax.halo.config import check_teacher
from hybridjax.halo.transfer import choices, only_block, student, swapped
from hybridjax.mixers.base import Mixer


def tokens_of(rng):
    return jnp.asarray(rng.integers(256, size=(2, 12)), jnp.int32)


@pytest.mark.slow
def test_a_choice_of_attention_everywhere_is_the_teacher(rng):
    halo, tokens = conversion(), tokens_of(rng)
    teacher = teacher_of(halo)
    mixers = mixers_of(halo, teacher)
    model = choices(halo, halo.model, teacher, mixers)
    same, other = (model(tokens, data=jnp.full(2, i)) for i in (0, 1))
    np.testing.assert_array_equal(same, teacher(tokens))
    assert np.abs(other - same).max() > 0.01
    one = swapped(halo, halo.model, "LA", teacher, mixers)(tokens)
    np.testing.assert_allclose(one, model(tokens, data=jnp.array([1, 0])), atol=1e-5)
    assert np.abs(one - same).max() > 0.01


@pytest.mark.parametrize(
    "gate",
    [
        pytest.param(False, id="no gate", marks=pytest.mark.slow),
        pytest.param(True, id="gates that preserve"),
    ],
)
def test_a_student_that_keeps_all_attention_is_the_teacher(rng, gate):
    halo = conversion(attention=dict(rope=True, gate=gate))
    teacher, tokens = teacher_of(halo), tokens_of(rng)
    model = student(halo, halo.model, "AA", teacher, mixers_of(halo, teacher))
    np.testing.assert_array_equal(model(tokens), teacher(tokens))


@pytest.mark.slow
def test_each_layer_gets_its_own_weights():
    """In an irregular stack, whose groups are not the teacher's."""
    halo = conversion("TTTT")
    teacher = teacher_of(halo)
    mixers = mixers_of(halo, teacher)
    model = student(halo, halo.model, "LALL", teacher, mixers)
    for i, letter in enumerate("LALL"):
        block, old = model.layer(i), teacher.layer(i)
        mixer, attention = block.mixers[0], old.mixers[0]
        np.testing.assert_array_equal(block.mlp.up.kernel[...], old.mlp.up.kernel[...])
        query = attention.qkv.query.kernel[...]
        np.testing.assert_array_equal(mixer.qkv.query.kernel[...], query)
        assert mixer.qkv.rope == (letter == "L")
        doubled = 2 if letter == "A" else 1  # against a gate of 1/2
        expected = doubled * attention.output.kernel[...]
        np.testing.assert_array_equal(mixer.output.kernel[...], expected)
        assert not mixer.output.gate.kernel[...].any()


@pytest.mark.parametrize(
    "linear", ["lightning", pytest.param("gated_deltanet", marks=pytest.mark.slow)]
)
def test_key_value_heads_are_repeated_interleaved(linear):
    halo = conversion(linear=linear)
    teacher = teacher_of(halo)
    attention, mixers = only_block(teacher).mixers[0], mixers_of(halo, teacher)
    own = getattr(mixers, "qkv", mixers)
    for name in ("key", "value"):
        new = getattr(own, name).kernel[...].reshape(2, 16, 4, 8)
        old = getattr(attention.qkv, name).kernel[...].reshape(2, 16, 2, 8)
        for head in range(4):
            np.testing.assert_array_equal(new[:, :, head], old[:, :, head // 2])


@pytest.mark.slow
def test_fresh_gates_are_the_constructors():
    halo = dataclasses.replace(conversion(), gates="fresh")
    teacher = teacher_of(halo)
    mixers = mixers_of(halo, teacher)
    model = student(halo, halo.model, "AL", teacher, mixers)
    mixer, attention = model.layer(0).mixers[0], teacher.layer(0).mixers[0]
    np.testing.assert_array_equal(mixer.output.kernel[...], attention.output.kernel[...])
    assert mixer.output.gate.kernel[...].std() > 0.1 and mixers.output.gate.kernel[...].std() > 0.1


def with_mixer(halo, **options):
    return dataclasses.replace(halo, linear={**halo.linear, **options})


FAULTS = {
    "heads": (dict(heads=2), "config.linear.heads is 2 and the teacher has 4"),
    "head_dim": (dict(head_dim=16), "config.linear.head_dim is 16 and the teacher has 8"),
}


@pytest.mark.parametrize("options, line", FAULTS.values(), ids=FAULTS)
def test_a_student_of_other_widths_is_refused(options, line):
    halo = with_mixer(conversion(), **options)
    with pytest.raises(UserError, match=line):
        check_teacher(halo, halo.model)


class Nothing(Mixer):
    """A mixer without projections."""

    def __init__(self, width, key):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))


def test_a_mixer_that_inherits_nothing_or_too_little_is_refused():
    halo = conversion()
    teacher = teacher_of(halo)
    bare = dataclasses.replace(halo, linear={"type": f"{__name__}:Nothing"})
    wide = with_mixer(conversion(linear="gated_deltanet"), value_heads=8)
    for changed, line in ((bare, "Nothing has no query"), (wide, "output projection is")):
        with pytest.raises(UserError, match=line):
            jax.eval_shape(lambda: mixers_of(changed, teacher))


def test_a_teacher_of_several_letters_is_refused():
    halo = conversion()
    blocks = {**halo.model.blocks, "U": halo.model.blocks["T"]}
    mixed = dataclasses.replace(halo.model, layers="TU", blocks=blocks)
    with pytest.raises(UserError, match="the teacher's stack is TU"):
        check_teacher(halo, mixed)
