"""Compilation for real TPUs, on any machine that has libtpu: interpretation checks no lowering."""

import importlib.util
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule.shapes import SHAPES as DELTA_SHAPES
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention.decay import alibi_slopes
from pallas_kernels.linear_attention.shapes import SHAPES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DEFAULT = {("v5e", "hypenet-2b"), ("v5p", "mamba2-2.7b"), ("v6e", "hypenet-9b"),
           ("tpu7x", "minicpm-sala")}


@pytest.fixture
def mesh_of(monkeypatch):
    for name, value in dict(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost",
    ).items():
        monkeypatch.setenv(name, os.environ.get(name, value))

    def mesh_of(chip, devices=1):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
        devices = np.array(topology.devices[:devices])
        return Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))

    return mesh_of


def compile_gradients(mesh, shape, dtype, segments=True, implementation="tpu"):
    """Forward and backward of one row, with states in and out."""
    H, K, V, T = shape.H, shape.K, shape.V, shape.T
    array = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P()))
    arrays = dict(
        q=array((1, T, H, K), dtype), k=array((1, T, H, K), dtype), v=array((1, T, H, V), dtype),
        initial_state=array((1, H, K, V), jnp.float32))
    constant = -alibi_slopes(H)
    if shape.decay == "token":
        arrays["decay"] = array((1, T, H), jnp.float32)

    def loss(arrays, segments):
        o, state = linear_attention(
            **({"decay": constant} | arrays), segments=segments, output_final_state=True,
            implementation=implementation)
        return (o.astype(jnp.float32) ** 2).sum() + (state**2).sum()

    segments = array((1, T), jnp.int32) if segments else None
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(arrays, segments).lower().compile().as_text()


def kernels(text, op="linear_attention"):
    lines = [line for line in text.splitlines() if "tpu_custom_call" in line]
    return {name for name in ("forward", "backward")
            if any(f"{op}_{name}" in line for line in lines)}


@pytest.mark.parametrize(
    "chip, shape",
    [pytest.param(chip, shape, marks=() if (chip, shape) in DEFAULT else pytest.mark.slow)
     for chip in CHIPS for shape in SHAPES],
)
def test_linear_attention_compiles(chip, shape, mesh_of):
    text = compile_gradients(mesh_of(chip), SHAPES[shape], jnp.bfloat16)
    assert kernels(text) == {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("T, width, dtype, segments",
                         [(1, 64, "float32", True), (20, 96, "bfloat16", False),
                          (300, 256, "float32", False), (1000, 256, "bfloat16", True)])
@pytest.mark.parametrize("decay", ["heads", "token"])
def test_odd_shapes_compile(chip, T, width, dtype, segments, decay, mesh_of):
    shape = SHAPES["tiny"]._replace(T=T, H=3, K=width, V=128, decay=decay)
    text = compile_gradients(mesh_of(chip), shape, jnp.dtype(dtype), segments)
    assert kernels(text) == {"forward", "backward"}


def spills(benchmark, call):
    """In a process of its own: libtpu reads once where to leave its schedules."""
    code = f"from benchmarks import {benchmark}; print({benchmark}.{call}['spills'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("op, direction, chip, decay, most", [
    ("linear_attention", "forward", "v5e", "constant", 0),
    ("linear_attention", "forward", "v5e", "packed", 0),
    ("linear_attention", "forward", "v5e", "token, packed", 0),
    ("linear_attention", "forward", "v5p", "packed", 0),
    ("linear_attention", "forward", "v6e", "constant", 0),
    ("linear_attention", "backward", "v5e", "constant", 0),
    ("linear_attention", "backward", "v5e", "packed", 0),
    ("linear_attention", "backward", "v5p", "constant", 0),
    ("linear_attention", "backward", "v6e", "constant", 0),
    ("linear_attention", "backward", "tpu7x", "constant", 0),
    ("linear_attention", "backward", "v6e", "token, packed", 1500),
    ("gated_delta_rule", "forward", "v5e", "token, packed", 600),  # 1700
    ("gated_delta_rule", "forward", "v6e", "token, packed", 600),
])
def test_registers_are_hardly_spilled(op, direction, chip, decay, most):
    call = f"meter({op!r}, {chip!r}, static_kernels.USED[{op!r}], {direction!r}, {decay!r})"
    assert spills("static_kernels", call) <= most


def test_tpu_kernels_are_the_default_on_tpu(mesh_of):
    shape = SHAPES["tiny"]._replace(T=64)
    text = compile_gradients(mesh_of("v5e"), shape, jnp.bfloat16, implementation=None)
    assert kernels(text) == {"forward", "backward"}


def test_compiles_in_a_sharded_scan_with_remat(mesh_of):
    """As mixers call it: shard_map in a checkpointed scan over layers."""
    mesh = mesh_of("v5e", devices=4)
    spec = P("data")
    x = jax.ShapeDtypeStruct((4, 64, 2, 32), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    gains = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    op = jax.shard_map(lambda x: linear_attention(x, x, x, -alibi_slopes(2))[0],
                       in_specs=spec, out_specs=spec, check_vma=False)

    def loss(x, gains):
        layer = jax.checkpoint(lambda x, gain: (op(gain * x), None))
        return (jax.lax.scan(layer, x, gains)[0].astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(x, gains).lower().compile().as_text()
    assert kernels(text) == {"forward", "backward"}


def compile_delta_rule(mesh, shape, direction, dtype=jnp.bfloat16, T=4096, implementation="tpu"):
    """One row of packed documents, with states in and out; in both directions for gradients."""
    array = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P()))
    arrays = {name: array(x.shape, x.dtype) for name, x in shape.arrays(1, T, dtype).items()}
    arrays["initial_state"] = array((1, shape.value_heads, shape.K, shape.V), jnp.float32)

    def rule(arrays, segments):
        return gated_delta_rule(**arrays, segments=segments, l2_norm=True,
                                output_final_state=True, implementation=implementation)

    def loss(arrays, segments):
        o, state = rule(arrays, segments)
        return (o.astype(jnp.float32) ** 2).sum() + (state**2).sum()

    f = rule if direction == "forward" else jax.grad(loss)
    with jax.set_mesh(mesh):
        traced = jax.jit(f).trace(arrays, array((1, T), jnp.int32))
        return kernels(traced.lower().compile().as_text(), "gated_delta_rule")


DELTA_DEFAULT = {("v5e", "qwen3-next-80b", "forward"), ("v6e", "qwen3-next-80b", "backward")}


@pytest.mark.parametrize(
    "chip, shape, direction",
    [pytest.param(*case, marks=() if case in DELTA_DEFAULT else pytest.mark.slow)
     for case in itertools.product(CHIPS, DELTA_SHAPES, ("forward", "backward"))],
)
def test_gated_delta_rule_compiles(chip, shape, direction, mesh_of):
    found = compile_delta_rule(mesh_of(chip), DELTA_SHAPES[shape], direction)
    assert found == {"forward", direction}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("T, dtype, heads, width", [(20, "float32", (3, 3), 64),
                                                    (300, "float32", (1, 3), 256),
                                                    (1000, "bfloat16", (2, 6), 96)], ids=str)
def test_odd_shapes_of_the_delta_rule_compile(chip, T, dtype, heads, width, mesh_of):
    shape = DELTA_SHAPES["fla-default"]._replace(
        heads=heads[0], value_heads=heads[1], K=width, V=64)
    found = compile_delta_rule(mesh_of(chip), shape, "backward", jnp.dtype(dtype), T, None)
    assert found == {"forward", "backward"}
