"""Every row of the ablation study is a setting of configs/halo.py, and changes what it says."""

import importlib

import jax
import pytest

from configs import halo as configs
from hybridjax.config import typed
from hybridjax.halo.config import HaloConfig
from hybridjax.halo.transfer import linear_mixers, student
from hybridjax.models.decoder import Decoder

CHANGED = {  # what the attention and the linear mixer of a student are then
    "attention-rope": lambda attention, linear: attention.qkv.rope,
    "linear-nope": lambda attention, linear: not linear.qkv.rope,
    "linear-no-norm": lambda attention, linear: linear.qkv.query_norm is None,
    "linear-grouped": lambda attention, linear: linear.kv_heads < linear.heads,
    "linear-no-gate": lambda attention, linear: linear.output.gate is None,
    "attention-no-gate": lambda attention, linear: attention.output.gate is None,
}


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend("studies")
    return importlib.import_module("halo_ablations").ROWS


def conversion(settings=()) -> HaloConfig:
    return typed(configs.get_config(",".join(["tiny", *settings])), HaloConfig)


def mixers_of(halo: HaloConfig):
    """The attention and a linear mixer of a student, abstract."""

    def convert():
        teacher = Decoder(halo.model, jax.random.key(0))
        model = student(halo, halo.model, "LALL", teacher, linear_mixers(halo, teacher))
        return model.layer(1).mixers[0], model.layer(0).mixers[0]

    return jax.eval_shape(convert)


def test_a_row_changes_one_thing(rows):
    mixers = {name: mixers_of(conversion(rows[name].settings)) for name in ("halo", *CHANGED)}
    changes = {name: {row for row, m in mixers.items() if f(*m)} for name, f in CHANGED.items()}
    assert changes == {name: {name} for name in CHANGED}


def test_rows_share_the_stages_that_they_do_not_change(rows):
    base = conversion()
    for name, row in rows.items():
        halo = conversion(row.settings)
        same = (halo.linear, halo.gates) == (base.linear, base.gates)
        assert ("align" in row.stages) == same, name
