"""Products of f32 arrays have all digits on accelerators too; those of bf16 arrays need not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.lax import Precision

from pallas_kernels.attention import attention
from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
from pallas_kernels.chunk_topk import chunk_topk
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.stick_breaking_attention import stick_breaking_attention

B, T, H, K, C = 1, 32, 2, 8, 4
CHUNKS = np.zeros((B, T, H, 1), np.int32)
DECAY = -np.ones((B, T, H), np.float32)
OPS = {
    "attention": lambda q, k, v: attention(q, k, v, implementation="xla"),
    "stick_breaking": lambda q, k, v: stick_breaking_attention(q, k, v, implementation="xla"),
    "linear_attention": lambda q, k, v: linear_attention(q, k, v, DECAY, implementation="xla")[0],
    "gated_delta_rule": lambda q, k, v: gated_delta_rule(
        q, k, v, jnp.asarray(-DECAY, v.dtype), DECAY, implementation="xla")[0],
    "chunk_sparse_attention": lambda q, k, v: chunk_sparse_attention(
        q, k, v, CHUNKS, chunk_size=C, implementation="xla"),
    "chunk_topk": lambda q, k, v: chunk_topk(
        q, k[:, :: C], k=1, chunk_size=C, implementation="xla")[1] * v[..., :1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """The forms for long rows, whose backward passes are written by hand."""
    monkeypatch.setattr("pallas_kernels.attention.xla._LARGEST_DIRECT", 0)
    monkeypatch.setattr("pallas_kernels.chunk_sparse_attention.xla._FEW", 0)


def precisions(op, dtype):
    """Of all products in the op's value and gradient."""
    loss = lambda *qkv: jnp.sum(op(*qkv).astype(jnp.float32))
    arrays = [jnp.ones((B, T, H, K), dtype)] * 3
    traced = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.params["precision"])
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(traced.jaxpr)
    return found


@pytest.mark.parametrize("name", OPS)
def test_f32_arrays_are_multiplied_in_f32(name):
    found = precisions(OPS[name], jnp.float32)
    assert len(found) > 2
    assert set(found) == {(Precision.HIGHEST, Precision.HIGHEST)}


@pytest.mark.parametrize("name", OPS)
def test_bf16_arrays_are_multiplied_fast(name):
    """But for the inverse of the gated delta rule, whose errors would grow."""
    found = precisions(OPS[name], jnp.bfloat16)
    exact = sum(precision is not None for precision in found)
    assert exact == 0 if name != "gated_delta_rule" else 0 < exact < len(found) / 2


def test_what_the_caller_has_set_stays_for_bf16():
    with jax.default_matmul_precision("high"):
        assert set(precisions(OPS["linear_attention"], jnp.bfloat16)) == {(Precision.HIGH,) * 2}
