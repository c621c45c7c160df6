import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from ml_collections import ConfigDict

from hybridjax.config import Config, UserError, build, choose, override, spec, typed

# ---------------------------------------------------------------- typed


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    on: bool = False
    sizes: tuple[int, ...] = ()
    inner: Inner = Inner()
    many: Mapping[str, Inner] = dataclasses.field(default_factory=dict)
    part: Mapping[str, Any] | None = None


def test_what_is_not_given_has_its_default():
    assert typed({"name": "a"}, Outer) == Outer("a")


TYPED = {
    "plain": (dict(rate=1.5, on=True), dict(rate=1.5, on=True)),
    "an int for a float": (dict(rate=2), dict(rate=2.0)),
    "a list for a tuple": (dict(sizes=[1, 2]), dict(sizes=(1, 2))),
    "a section": (dict(inner=dict(size=3)), dict(inner=Inner(3))),
    "sections by name": (dict(many=dict(a=dict(size=3))), dict(many={"a": Inner(3)})),
    "none": (dict(part=None), dict(part=None)),
    "a spec": (dict(part=dict(type="x", n=[1, [2]])), dict(part=dict(type="x", n=(1, (2,))))),
}


@pytest.mark.parametrize("kind", (dict, ConfigDict))
@pytest.mark.parametrize("given, fields", TYPED.values(), ids=TYPED)
def test_values_are_converted(given, fields, kind):
    assert typed(kind(dict(name="a", **given)), Outer) == Outer("a", **fields)
    assert type(typed(kind(dict(name="a", **given)), Outer).rate) is float


FAULTS = {
    "a near key": (dict(name="a", sise=1), "config.sise: no such setting; did you mean sizes"),
    "an unknown key": (
        dict(name="a", zzzz=1),
        "config.zzzz: no such setting; there are name, rate",
    ),
    "a key within": (
        dict(name="a", inner=dict(sizes=1)),
        "config.inner.sizes: .* did you mean size",
    ),
    "a missing key": ({}, "config.name is missing: set it in the config file"),
    "a text for an int": (dict(name="a", inner=dict(size="1")), "config.inner.size is '1', a str"),
    "a bool for an int": (
        dict(name="a", inner=dict(size=True)),
        "is True, a bool; it must be a int",
    ),
    "a bool for a float": (dict(name="a", rate=True), "config.rate is True, a bool"),
    "a fraction for an int": (dict(name="a", inner=dict(size=1.5)), "is 1.5, a float"),
    "an item of a tuple": (dict(name="a", sizes=(1, "2")), r"config.sizes\[1\] is '2'"),
    "a number for a section": (dict(name="a", inner=3), "config.inner is 3, a int"),
    "within a named section": (dict(name="a", many=dict(x=dict(size=""))), "config.many.x.size"),
}


@pytest.mark.parametrize("given, line", FAULTS.values(), ids=FAULTS)
def test_a_wrong_value_is_refused_in_one_line(given, line):
    with pytest.raises(UserError, match=line) as caught:
        typed(given, Outer)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- choose and override


def small() -> ConfigDict:
    return ConfigDict(
        dict(
            name="run",
            model=dict(layers="A", blocks=dict(A=dict(mixers=(ConfigDict(dict(heads=2)),)))),
            steps=10,
        )
    )


def faster(config: ConfigDict) -> None:
    config.optimizer.learning_rate = 1.0


PRESETS = {"small": small, "other": lambda: small()}
VARIANTS = {"faster": faster}


def test_without_an_argument_the_first_preset_is_chosen():
    for arg in (None, "", "small"):
        assert choose(arg, PRESETS, VARIANTS) == choose("small", PRESETS, VARIANTS)
    assert choose(None, PRESETS).name == "run-small"


def test_settings_that_have_a_default_can_be_overridden():
    config = choose("small", PRESETS)
    assert config.seed == Config.seed and config.mesh.data == -1
    assert config.evaluation.lengths == Config.evaluation.lengths
    assert config.evaluation.task == ConfigDict()  # made anew for each config
    assert "batch_size" not in config  # has none


def test_variants_and_overrides_apply_in_order():
    config = choose("other,faster,steps=3,optimizer.learning_rate=0.25", PRESETS, VARIANTS)
    assert (config.name, config.steps) == ("run-other-faster", 3)
    assert config.optimizer.learning_rate == 0.25
    assert choose("small,optimizer.learning_rate=0.25,faster", PRESETS, VARIANTS) \
        .optimizer.learning_rate == 1.0  # fmt: skip
    assert choose("small", PRESETS).steps == 10  # each choice is its own


CHOICES = {
    "a preset": ("smal", "unknown preset 'smal'; did you mean small"),
    "a preset unlike any": ("zzzzzz", "unknown preset 'zzzzzz'; there are small, other"),
    "a variant": ("small,fastr", "unknown variant 'fastr'; did you mean faster"),
    "a key": ("small,stepz=1", "config.stepz: no such setting as 'stepz'; did you mean steps"),
}


@pytest.mark.parametrize("arg, line", CHOICES.values(), ids=CHOICES)
def test_a_choice_that_is_not_there_is_refused(arg, line):
    with pytest.raises(UserError, match=line):
        choose(arg, PRESETS, VARIANTS)


OVERRIDES = {
    "a number": ("steps", "3", lambda c: c.steps == 3),
    "a float": ("optimizer.b1", "0.5", lambda c: c.optimizer.b1 == 0.5),
    "text as it is": ("model.layers", "AA", lambda c: c.model.layers == "AA"),
    "text that looks like a number": ("name", "3", lambda c: c.name == "3"),
    "a tuple": ("evaluation.lengths", "(1, 2)", lambda c: c.evaluation.lengths == (1, 2)),
    "an item": (
        "model.blocks.A.mixers[0].heads",
        "4",
        lambda c: c.model.blocks.A.mixers[0].heads == 4,
    ),
}


@pytest.mark.parametrize("path, text, check", OVERRIDES.values(), ids=OVERRIDES)
def test_override(path, text, check):
    config = choose(None, PRESETS)
    override(config, path, text)
    assert check(config)


WRONG = {
    "no number": ("steps", "many", "config.steps is 'many'; it must be a int"),
    "a fraction": ("steps", "1.5", "config.steps is '1.5'; it must be a int"),
    "no bool": ("model.blocks.A.mixers[0].heads", "on", "it must be a int"),
    "no such item": ("model.blocks.A.mixers[3].heads", "1", "no such setting as '3'"),
    "no such section": ("optimiser.b1", "1.0", "'optimiser'; did you mean optimizer"),
    "below a value": ("steps.more", "1", "no such setting as 'more'"),
}


@pytest.mark.parametrize("path, text, line", WRONG.values(), ids=WRONG)
def test_a_wrong_override_is_refused(path, text, line):
    config = choose(None, PRESETS)
    with pytest.raises(UserError, match=line):
        override(config, path, text)
    assert config == choose(None, PRESETS)


# ---------------------------------------------------------------- components


class Part:
    def __init__(self, width, *, heads: int, rope: bool = True):
        self.width, self.heads, self.rope = width, heads, rope


REGISTRY = {"part": f"{__name__}:Part"}


def test_a_spec_has_the_defaults_of_the_constructor():
    assert spec("part", REGISTRY, heads=2).to_dict() == dict(type="part", heads=2, rope=True)


@pytest.mark.parametrize("type", ("part", f"{__name__}:Part"))
def test_build_calls_the_constructor(type):
    part = build(spec(type, REGISTRY, heads=2, rope=False), REGISTRY, 8)
    assert (part.width, part.heads, part.rope) == (8, 2, False)


SPECS = {
    "an option": ("part", dict(heads=2, rop=1), "part has no option rop; did you mean rope"),
    "what the caller gives": ("part", dict(heads=2, width=1), "part has no option width"),
    "a missing option": ("part", {}, "part needs the option heads: give it in the config"),
    "a type": ("prat", {}, "unknown component 'prat'; did you mean part"),
    "a module": ("no.such:Part", {}, "cannot import 'no.such:Part'"),
    "a class": (f"{__name__}:No", {}, f"cannot import '{__name__}:No'"),
}


@pytest.mark.parametrize("type, options, line", SPECS.values(), ids=SPECS)
def test_a_wrong_spec_is_refused(type, options, line):
    with pytest.raises(UserError, match=line):
        spec(type, REGISTRY, **options)
