"""Compiling for what is not at hand: the text of programs, the bill, memory, the command."""

import dataclasses
import functools
import importlib.util
import json

import commands
import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybridjax.aot import collectives, hlo, memory, program, sweep
from hybridjax.aot.bill import bill, visible_keys
from hybridjax.aot.bound import Bound, bandwidth
from hybridjax.aot.flops import count
from hybridjax.aot.hardware import CHIPS, lies_on
from hybridjax.aot.measure import Job
from hybridjax.config import MeshConfig, UserError, typed
from hybridjax.mixers.base import Context
from hybridjax.models.block import Block
from hybridjax.sharding import MESH_AXES, make_mesh, place_parameters
from pallas_kernels.attention import attention

pytest_plugins = ("commands",)


@pytest.fixture(autouse=True)
def compilation_cache():
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


# ---------------------------------------------------------------- the text of a program

LOOP = """
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %kernel = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"metadata":"{}"
}}, metadata={op_name="kernel"}
  %ar = f32[8,128]{1,0:T(8,128)} all-reduce(%kernel), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%j, /*index=1*/%ar)
}

ENTRY %main (w: f32[8,128]) -> f32[8,128] {
  %w = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %w)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body, metadata={op_name="scan"}
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
SIZE = 8 * 128 * 4


def mesh_of(**sizes):
    return make_mesh(
        MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])]
    )


GROUPS = {
    "all": ("{}", ("data", "fsdp", "tensor"), 8),
    "listed": ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
    "iota": ("[2,4]<=[8]", ("fsdp", "tensor"), 4),
    "transposed": ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
    "of a mesh": ("mesh['a'=2,'b'=2,'c'=2] {'b'}", ("fsdp",), 2),
    "of a mesh in another order": (
        "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",), 2,
    ),
    "part of an axis": ("mesh['a'=8] {'a':(2)2}", ("fsdp",), 2),
}  # fmt: skip


@pytest.mark.parametrize("groups, axes, size", GROUPS.values(), ids=GROUPS)
def test_a_collective_in_a_loop_counts_as_often_as_it_runs(groups, axes, size):
    module = hlo.parse(LOOP.replace("GROUPS", groups))
    [found] = collectives.collectives(module, mesh_of(data=2, fsdp=2, tensor=2))
    assert (found.kind, found.axes, found.count) == ("all-reduce", axes, 5)
    assert found.sent == 5 * SIZE * 2 * (size - 1) / size


def test_what_stays_on_the_chip_is_no_traffic():
    module = hlo.parse(LOOP.replace("GROUPS", "{}"))
    assert module.runs() == ({"main": 1, "body": 5, "add": 5}, [])
    kernel, reduction = SIZE, SIZE  # one reads HBM, the other writes it
    assert module.hbm_bytes() == 5 * (kernel + reduction)


def test_a_loop_of_unknown_length_is_named():
    text = LOOP.replace("GROUPS", "{}").replace("s32[]{:T(128)} constant(5)", "s32[] add(%i, %i)")
    runs, unknown = hlo.parse(text).runs()
    assert runs["body"] == 1 and unknown == ["scan"]


ASYNC = """
HloModule jit_f

%start (p0: bf16[1,32]) -> bf16[1,64] {
  %p0 = bf16[1,32]{1,0} parameter(0)
  %all-gather.1 = bf16[1,64]{1,0} all-gather(%p0), channel_id=7, replica_groups=[1,2]<=[2], dimensions={1}
  ROOT %s = (bf16[1,32], bf16[1,64]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p1: bf16[1,32]) -> bf16[1,64] {
  %p1 = bf16[1,32]{1,0} parameter(0)
  %all-gather.2 = bf16[1,64]{1,0} all-gather(%p1), channel_id=7, replica_groups=[1,2]<=[2], dimensions={1}
  ROOT %d = bf16[1,64]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[1,32]) -> bf16[1,64] {
  %w = bf16[1,32]{1,0} parameter(0)
  %f = (bf16[1,32], bf16[1,64]) fusion(%w), kind=kCustom, calls=%start
  %permute-start = (bf16[1,32], bf16[1,32], u32[], u32[]) collective-permute-start(%w), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %permute-done = bf16[1,32] collective-permute-done(%permute-start)
  ROOT %g = bf16[1,64]{1,0} fusion(%w), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_an_asynchronous_collective_counts_once():
    found = collectives.collectives(hlo.parse(ASYNC), mesh_of(fsdp=2))
    assert {(c.kind, c.axes, c.count, c.sent) for c in found} == {
        ("all-gather", ("fsdp",), 1, 64.0),
        ("collective-permute", ("fsdp",), 1, 64.0),
    }


def partitioned(f, mesh, spec, out, shape=(16, 8, 32)):
    """The module of `f` on each device's part of an array."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
    return hlo.parse(jax.jit(mapped).lower(x).compile().as_text())


def three_times(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=3)[0]


def swap(x):
    return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])


PART = 16 * 8 * 32 * 4 // 8  # bytes on one of eight devices
REAL = {
    "psum": (lambda x: jax.lax.psum(jnp.sin(x), "fsdp") / 9, "all-reduce", "fsdp", 1.5 * PART),
    "psum of two": (
        lambda x: jax.lax.psum(jnp.sin(x), ("data", "fsdp")) / 9, "all-reduce", "data fsdp",
        2 * 7 / 8 * PART,
    ),
    "all_gather": (
        lambda x: jax.lax.all_gather(jnp.sin(x), "fsdp")[0], "all-gather", "fsdp", 3 * PART,
    ),
    "psum_scatter": (
        lambda x: jnp.tile(
            jax.lax.psum_scatter(jnp.sin(x), "fsdp", scatter_dimension=1, tiled=True), (1, 4, 1)
        ),
        "reduce-scatter", "fsdp", 0.75 * PART,
    ),
    "ppermute": (lambda x: swap(jnp.sin(x)), "collective-permute", "data", PART),
    "all_to_all": (
        lambda x: jax.lax.all_to_all(jnp.sin(x), "fsdp", 1, 1, tiled=True), "all-to-all", "fsdp",
        0.75 * PART,
    ),
}  # fmt: skip


@pytest.mark.parametrize("f, kind, axes, sent", REAL.values(), ids=REAL)
def test_collectives_of_a_scan_of_three_layers(f, kind, axes, sent):
    mesh = mesh_of(data=2, fsdp=4)
    spec = P(("data", "fsdp"))
    module = partitioned(three_times(f), mesh, spec, spec)
    [found] = collectives.collectives(module, mesh)
    assert (found.kind, found.axes, found.count) == (kind, tuple(axes.split()), 3)
    assert found.sent == 3 * sent


def test_slices_exchange_by_their_hosts():
    send = """
ENTRY %main (w: f32[8,128]) -> f32[8,128] {
  %w = f32[8,128]{1,0} parameter(0)
  %t = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%w, %t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %c = f32[8,128]{1,0} copy(%w)
}
"""  # noqa: E501

    @dataclasses.dataclass(frozen=True)
    class Device:
        slice_index: int

    mesh = mock_mesh([[Device(0), Device(0)], [Device(1), Device(1)]], ("data", "fsdp"))
    [found] = collectives.collectives(hlo.parse(send), mesh)
    assert found == collectives.Collective("all-reduce", ("data",), 1, SIZE)
    assert bandwidth(CHIPS["v5e"], mesh, ("data",)) == CHIPS["v5e"].dcn_bandwidth


@dataclasses.dataclass(frozen=True)
class mock_mesh:
    grid: list
    axis_names: tuple

    @property
    def devices(self):
        return np.array(self.grid)

    @property
    def size(self):
        return self.devices.size


# ---------------------------------------------------------------- FLOPs and the bill


def xla_flops(f, *args):
    return jax.jit(f).lower(*args).cost_analysis()["flops"]


def test_flops_of_a_scan_are_those_of_its_layers():
    w = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32)

    def f(x, w, unroll):
        body = jax.checkpoint(lambda x, w: (x @ w, None))
        return jax.grad(lambda x: jnp.sum(jax.lax.scan(body, x, w, unroll=unroll)[0] ** 2))(x)

    found = count(jax.make_jaxpr(lambda x, w: f(x, w, 1))(x, w))
    assert found.hidden == () and found.counted == 2 * 4 * 2 * 128 * 64 * 64
    unrolled = xla_flops(lambda x, w: f(x, w, 4), x, w)
    np.testing.assert_allclose(found.counted, unrolled, rtol=0.01)


def test_flops_are_those_of_one_device():
    mesh = mesh_of(data=2, tensor=4)
    shapes = (((8, 16, 32), P("data")), ((32, 64), P(None, "tensor")))
    args = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=jax.NamedSharding(mesh, p)) for s, p in shapes
    ]
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda x, w: jnp.einsum("btd,df->btf", x, w)).trace(*args)
    assert count(traced.jaxpr).counted == 2 * 8 * 16 * 32 * 64 / 8


def model_config(**changes):
    config = micro.micro()
    config.model.update(changes)
    return typed(config).model


@pytest.mark.parametrize("letter", "LA")
def test_the_bill_of_a_letter_is_what_xla_counts(letter):
    """At a length whose logits are formed at once, nothing is hidden."""
    length, config = 64, model_config(layers=letter)
    [item, _] = (item for item, _ in bill(config, length).items)
    block = jax.eval_shape(
        lambda: Block(
            config.blocks[letter], config.width, jax.random.key(0), depth=1, norm_eps=1e-6
        )
    )
    h = jax.ShapeDtypeStruct((1, length, config.width), jnp.float32)
    tokens = jnp.zeros((1, length), jnp.int32)
    total = xla_flops(lambda b, h: b(h, Context.of_rows(tokens))[0], block, h)
    assert item.hidden_flops == 0 and item.unknown == ()
    products = item.flops * length
    assert products < total < 1.6 * products  # XLA counts additions of norms and softmax too


@pytest.mark.parametrize("window", (None, 16, 1, 500), ids=str)
def test_visible_keys(window):
    length, rows = 100, np.arange(100)
    expected = np.mean(np.minimum(rows + 1, window or length))
    np.testing.assert_allclose(visible_keys(length, window), expected)


def test_the_formula_of_attention_is_what_xla_counts_of_its_visible_half():
    length, heads, width = 64, 2, 8
    q = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
    total = count(jax.make_jaxpr(lambda q: attention(q, q, q, implementation="xla"))(q))
    config = model_config(layers="A")
    hidden = bill(config, 1024).items[0][0].hidden_flops
    formula = 4.0 * heads * width * visible_keys(length)
    assert total.counted / length == formula * length / visible_keys(length)
    assert hidden == 4.0 * heads * width * visible_keys(1024)


def test_states_and_their_sum():
    costs = bill(model_config(layers="LLLA"), 4096)
    linear, full = (item for item, _ in costs.items[:2])
    assert linear.state_per_token == 0 and linear.state_constant == 4 * 2 * 8 * 8 + 4
    assert full.state_per_token == 2 * 2 * 8 * 4 and full.state_constant == 4
    assert costs.state_bytes(4096) == 3 * linear.state_constant + 4 + 4096 * 128
    fewer = bill(model_config(layers="LLLLLLA"), 4096)
    assert fewer.total("state_per_token") == 128


def test_parameters_are_all_billed():
    config = typed(micro.micro())
    model = jax.eval_shape(lambda: program.new_model(config))
    expected = sum(x.size for x in jax.tree.leaves(model))
    assert bill(config.model, 32).total("parameters") == expected


@pytest.mark.parametrize("letter", "LA")
@pytest.mark.parametrize("axis", ("fsdp", "tensor"))
def test_what_the_bill_says_of_collectives_is_what_is_compiled(letter, axis):
    config, rows, length = model_config(layers=letter), 2, 16
    item = bill(config, length).items[0][0]
    mesh = mesh_of(**{axis: 2})
    with jax.set_mesh(mesh):
        new = lambda: place_parameters(
            Block(config.blocks[letter], config.width, jax.random.key(0), depth=1, norm_eps=1e-6)
        )
        block = program.placed(jax.eval_shape(new), mesh)
        tokens = jnp.zeros((rows, length), jnp.int32)
        spec = P("fsdp") if axis == "fsdp" else P()
        h = jax.ShapeDtypeStruct(
            (rows, length, config.width), jnp.float32, sharding=jax.NamedSharding(mesh, spec)
        )
        forward = jax.jit(lambda b, h: b(h, Context.of_rows(tokens))[0])
        module = hlo.parse(forward.lower(block, h).compile().as_text())
    found = collectives.collectives(module, mesh)
    sent = sum(c.sent for c in found if c.axes == (axis,))
    if axis == "fsdp":
        assert sent == item.gathered_bytes / 2
    else:  # and the mean square of a norm over heads: a number per token
        assert 0 <= sent - item.reduced_bytes * rows * length <= 4 * rows * length


# ---------------------------------------------------------------- bounds and memory


def test_the_bound_is_the_slowest_resource():
    limits = Bound(compute=2.0, hbm=1.0, axes={"fsdp": 4.0}, useful=300.0, peak=100.0)
    assert (limits.seconds, limits.limit) == (4.0, "fsdp")
    assert limits.mfu == 300 / 400 and limits.mfu_serial == 300 / 600


MESSAGES = {
    "temporaries": (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.00G) exceeds available HBM (15.75G).",
        18 * 2**30, (),
    ),
    "listed": (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 24.68G of 15.75G hbm. Exceeded hbm capacity by 8.93G.\n\n"
        "  Largest program allocations in hbm:\n\n"
        '  1. Size: 9.54G\n     Operator: op_name="jit(f)/dot_general" source_file="x.py"\n'
        "     Shape: f32[2560,1000]{1,0}\n     Unpadded size: 9.5G\n     XLA label: fusion\n",
        24.68 * 2**30, ("9.54G jit(f)/dot_general f32[2560,1000]{1,0}",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message, needed, largest", MESSAGES.values(), ids=MESSAGES)
def test_what_the_compiler_says_of_a_shortage(message, needed, largest):
    found = memory.shortage(message)
    assert found.needed == needed and found.available == 15.75 * 2**30
    assert found.largest == largest
    assert memory.shortage("INTERNAL: broken") is None


@dataclasses.dataclass(frozen=True)
class Sized:
    name: str
    parts: dict
    tokens: int

    def bytes(self):
        return self.parts


ADVICE = {
    "weights": (
        "train", dict(parameters=40, optimizer=80), 170.0, dict(data=4), {}, "--config.mesh.fsdp=2",
    ),
    "activations of many rows": (
        "train", dict(parameters=1, optimizer=2), 4e5, dict(data=1), {}, "--config.accumulate=2",
    ),
    "activations of one row": (
        "train", dict(parameters=1, optimizer=2), 4e5, dict(data=4), {}, "--config.mesh.context=2",
    ),
    "kept activations": (
        "train", dict(parameters=1, optimizer=2), 9e3, dict(data=4), dict(remat="names"),
        "--config.model.remat=full",
    ),
    "a cache": (
        "decode", dict(parameters=1, state=100), 101.0, dict(data=1), {}, "--config.mesh.tensor=2",
    ),
    "a cache of all heads": (
        "decode", dict(parameters=1, state=100), 101.0, dict(tensor=2), {},
        "--config.mesh.context=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, parts, needed, mesh, model, best", ADVICE.values(), ids=ADVICE)
def test_advice_is_about_what_fills_the_memory(name, parts, needed, mesh, model, best):
    config = micro.micro()
    config.model.update({"remat": "full", **model})
    found = memory.changes(Sized(name, parts, 1), typed(config), mesh_of(**mesh), needed)
    assert found[0].what.startswith(best), found
    assert all(a.saves >= b.saves for a, b in zip(found, found[1:]))


# ---------------------------------------------------------------- the sweep


def test_meshes_divide_the_devices_and_the_model():
    config = micro.micro()
    config.update(batch_size=8, seq_len=256)
    target = sweep.on_paper("v5e:4x4")
    found = sweep.estimates(typed(config), target, Job())
    meshes = [tuple(estimate.sizes[axis] for axis in MESH_AXES) for estimate in found]
    assert len(set(meshes)) == len(meshes) and (2, 4, 2, 1) in meshes
    for data, fsdp, tensor, context in meshes:
        assert data * fsdp * tensor * context == 16
        assert 8 % (data * fsdp) == 0 and 2 % tensor == 0 and 256 % (128 * context) == 0


TORI = {
    "two sides": ((16, 4, 1, 1), "v5p:4x4x4", True),
    "half a side": ((32, 2, 1, 1), "v5p:4x4x4", False),
    "the same side twice": ((16, 16, 1, 1), "v5p:8x8x16", False),
    "unequal sides": ((1, 64, 16, 1), "v5p:8x8x16", True),
    "the devices of a chip": ((32, 4, 1, 1), "tpu7x:4x4x4", True),
    "v5e is cut": ((32, 8, 1, 1), "v5e:16x16", True),
    "v6e is not": ((32, 8, 1, 1), "v6e:16x16", False),
}


@pytest.mark.parametrize("sizes, topology, fits", TORI.values(), ids=TORI)
def test_axes_are_whole_sides_of_the_torus(sizes, topology, fits):
    assert lies_on(sizes, topology) == fits


def test_a_sweep_drops_what_cannot_fit():
    target = sweep.on_paper("v5e:4x4")
    fits, not_ = (sweep.Estimate(MeshConfig(fsdp=n), m, 1.0) for n, m in ((2, 1e9), (1, 1e12)))
    assert sweep.promising([not_, fits], target) == [fits]
    with pytest.raises(UserError, match="no mesh of v5e:4x4 fits: the least is 931.3 GiB"):
        sweep.promising([not_], target)


# ---------------------------------------------------------------- the command

CONFIG = f"--config={commands.MICRO}:micro"
compile_ = functools.partial(commands.run, "compile")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)"
)

FAULTS = {
    "no topology": ([], "no topology: give --topology=v5p:4x4x4 or --bill"),
    "unknown family": (["--topology=v9:2x2"], "unknown topology 'v9:2x2': give one of v5e:RxC"),
    "unknown shape": (["--topology=cpu:2x2"], "unknown topology 'cpu:2x2' (the CPU has one number"),
    "no length": (
        ["--topology=cpu:8", "--program=decode"], "--program=decode needs --context=LENGTH",
    ),
    "a mesh that does not fit": (["--topology=cpu:8", "--config.mesh.fsdp=3"], "does not fit 8"),
    "too few rows": (["--topology=cpu:8"], "batch_size 4 is not divisible by accumulate x devices"),
    "unwritable": (
        ["--bill", "--json=/no/such/directory/x.json"], "cannot write /no/such/directory/x.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags, fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line(flags, fault):
    assert fault in compile_(CONFIG, *flags).error


def test_without_libtpu_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *args: None if name == "libtpu" else find(name, *args)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    error = compile_(CONFIG, "--topology=v5e:2x2").error
    assert error == "v5e:2x2 needs libtpu to compile: pip install 'hybridjax[tpu]'"


def test_the_bill_of_a_config(tmp_path):
    out = tmp_path / "bill.json"
    done = compile_(
        CONFIG, "--bill", "--context=1024", f"--json={out}", "--config.model.layers=LLA"
    )
    assert done.code == 0 and "forward at 1,024 tokens" in done.out
    items = json.loads(out.read_text())["items"]
    assert [(item["name"], item["times"]) for item in items] == [("L", 2), ("A", 1), ("ends", 1)]


def test_the_train_step_on_simulated_devices(tmp_path):
    out = tmp_path / "step.json"
    done = compile_(
        "--config=configs/hypenet.py:tiny,optimizer.name=adamw", "--topology=cpu:8",
        "--config.mesh.fsdp=2", "--config.mesh.tensor=2", f"--json={out}",
    )  # fmt: skip
    assert done.code == 0, done
    result = json.loads(out.read_text())
    assert result["mesh"] == dict(data=2, fsdp=2, tensor=2, context=1)
    assert result["fits"] and result["available"] is result["bound"] is None
    gathers = [c for c in result["collectives"] if c["kind"] == "all-gather"]
    assert {tuple(c["axes"]) for c in gathers} >= {("fsdp",)}
    assert result["parts"]["optimizer"] > 2 * result["parts"]["parameters"]
    assert result["flops"] > result["useful"] > 0
    assert "all-gather" in done.out and "by arithmetic from the shardings" in done.out


@needs_libtpu
def test_the_train_step_for_a_tpu(tmp_path):
    out = tmp_path / "step.json"
    done = compile_(
        CONFIG, "--topology=v5e:2x2", "--config.mesh.fsdp=2", "--config.seq_len=128",
        f"--json={out}",
    )  # fmt: skip
    assert done.code == 0, done
    result = json.loads(out.read_text())
    assert result["chips"] == 4 and result["memory"]["arguments"] > sum(result["parts"].values())
    kinds = {(c["kind"], *c["axes"]) for c in result["collectives"]}
    assert {("all-gather", "fsdp"), ("all-reduce", "data", "fsdp")} <= kinds
    assert result["hidden"] > 0  # splash attention, chosen for the topology and not for this host
    assert result["bound"]["seconds"] > 0 and "TFLOP/s" in done.out


@needs_libtpu
@pytest.mark.slow
def test_rotary_positions_of_long_rows_for_a_tpu():
    """Lookups in tables of thousands of rows failed in libtpu 0.0.50, on v5p and when training."""
    done = compile_(
        "--config=configs/hypenet.py:9b,model.layers=LL,model.width=512,model.vocab=1024",
        "--topology=v5p:2x2x1", "--config.mesh.data=4", "--config.seq_len=4096",
        "--config.batch_size=4",
    )  # fmt: skip
    assert done.code == 0, done


@needs_libtpu
def test_what_does_not_fit_is_refused_with_advice():
    done = compile_(
        CONFIG, "--topology=v5e:2x2", "--program=decode", "--context=16777216", "--rows=64",
        "--config.model.layers=A", "--config.mesh.data=1", "--config.mesh.tensor=2",
        "--config.mesh.fsdp=2",
    )  # fmt: skip
    assert done.code == 1, done
    assert "DOES NOT FIT" in done.out and "largest buffers of a device:" in done.out
    assert "saves about" in done.out and "--rows=32" in done.out


HALO = "--config=tests/halo/micro_halo.py:micro"
STAGE_FAULTS = {
    "no stage": ([HALO], "is a conversion: give --program=align|distill|finetune"),
    "no conversion": ([CONFIG, "--program=align"], "is a stage of a conversion: give configs/halo"),
    "letters": (
        [HALO, "--program=distill", "--config.select.layers=LAL"], "is 'LAL': give 2 letters",
    ),
    "a sweep": (
        [HALO, "--program=align", "--sweep", "--topology=cpu:8"], "--sweep knows no stages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags, fault", STAGE_FAULTS.values(), ids=STAGE_FAULTS)
def test_a_fault_about_stages_is_one_line(flags, fault):
    assert fault in compile_(*flags).error


@pytest.mark.parametrize("stage", ("align", pytest.param("distill", marks=pytest.mark.slow)))
def test_a_stage_of_a_conversion_on_simulated_devices(stage, tmp_path):
    out = tmp_path / "stage.json"
    done = compile_(
        HALO, f"--program={stage}", "--topology=cpu:4", "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2", f"--json={out}",
    )  # fmt: skip
    assert done.code == 0, done
    result = json.loads(out.read_text())
    parts = result["parts"]
    assert parts["optimizer"] > 2 * parts["parameters"]  # AdamW's moments of what is trained
    everything = stage == "distill"  # alignment trains the mixers alone
    assert (parts["parameters"] > parts["teacher"]) == everything
    assert result["flops"] >= result["useful"] > 0


@pytest.mark.slow
def test_keys_and_values_on_the_host_take_nothing_of_a_device(tmp_path):
    out = tmp_path / "decode.json"
    done = compile_(
        "--config=configs/hsa.py:tiny,model.layers=EH", "--program=decode", "--context=65536",
        "--chunks=host", "--topology=cpu:4", "--config.mesh.data=1", "--config.mesh.context=4",
        f"--json={out}",
    )  # fmt: skip
    assert done.code == 0 and "not in the total" in done.out, done
    result = json.loads(out.read_text())
    assert result["parts"]["state on the host"] == 2 * 65536 * 32 * 2 // 4  # float16, one head
    assert result["parts"]["state"] < result["parts"]["state on the host"] / 4
    assert sum(c["sent"] for c in result["collectives"]) < 16 * 1024
