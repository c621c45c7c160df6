"""The programs of a run, compiled for TPUs that need not be here, call our kernels on any mesh."""

import importlib.util
import re

import pytest

from configs import gdn, hsa, hypenet
from hybridjax.aot import program
from hybridjax.aot.topology import target
from hybridjax.config import MeshConfig, typed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)"
)
MESH = MeshConfig(data=2, tensor=2, context=2)
LAYERS = {"lightning": (hypenet, "L"), "gated_deltanet": (gdn, "G"), "hsa": (hsa, "EH")}
CALLS = {
    ("lightning", "train"): {"linear_attention_forward", "linear_attention_backward"},
    ("lightning", "decode"): {"linear_attention_forward"},
    ("gated_deltanet", "train"): {"gated_delta_rule_forward", "gated_delta_rule_backward"},
    # It writes token by token with the recurrence in XLA (see its FEW): prompts are what it reads.
    ("gated_deltanet", "prefill"): {"gated_delta_rule_forward"},
    ("hsa", "train"): {
        "chunk_topk", "chunk_sparse_attention_forward", "chunk_sparse_attention_backward",
    },
    ("hsa", "decode"): {"chunk_topk", "chunk_sparse_attention_forward"},
}  # fmt: skip
DEFAULT = ("lightning", "decode")


@pytest.mark.parametrize(
    "mixer, name",
    [pytest.param(*case, marks=() if case == DEFAULT else pytest.mark.slow) for case in CALLS],
)
def test_a_program_on_a_mesh_calls_our_kernels(mixer, name):
    family, layers = LAYERS[mixer]
    config = family.tiny()
    config.model.layers = layers
    config.optimizer.name = "adamw"
    mesh = target("v5e:2x4").mesh(MESH)
    traced = program.trace(typed(config), mesh, name, rows=2, context=256).traced
    lines = traced.lower().compile().as_text().splitlines()
    calls = "\n".join(line for line in lines if "tpu_custom_call" in line)
    assert set(re.findall(r"shard_map/(\w+)/pallas_call", calls)) == CALLS[mixer, name]
