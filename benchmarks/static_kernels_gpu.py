"""What the compiler makes of the Hopper kernels: registers, spills, shared memory, instructions.

    python benchmarks/static_kernels_gpu.py         # all cases -> docs/results/static_kernels_gpu.*
    python benchmarks/static_kernels_gpu.py OP      # an op's, beside those of other ops there
    python benchmarks/static_kernels_gpu.py CASE    # one case, JSON on standard output

Compiles for an H100 (sm_90a, ptxas included) where no GPU is: needs the CUDA plugin of JAX's own
version and nvcc's wheel (`pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt
nvidia-cuda-nvcc-cu12`). Counts are of the program text, a loop's body once: PTX, and SASS too where
nvdisasm is found (`nvidia-cuda-nvdisasm`).
"""

import functools
import glob
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# A row is what an op's call is made of; every kernel of its forward and backward is compiled.
CASES = {
    "linear_attention-hypenet-2b": dict(op="linear_attention", T=32768, H=16, K=128, V=128),
    "linear_attention-hypenet-9b-1m": dict(op="linear_attention", T=2**20, H=32, K=128, V=128),
    "linear_attention-mamba2-packed": dict(
        op="linear_attention", T=32768, H=32, K=128, V=64, decay="token", packed=True),
    "linear_attention-gla-packed": dict(
        op="linear_attention", B=2, T=8192, H=8, K=128, V=128, decay="token", packed=True),
    "linear_attention-token": dict(
        op="linear_attention", T=4096, H=16, K=128, V=128, decay="token"),
    "linear_attention-64": dict(op="linear_attention", B=4, T=4096, H=16, K=64, V=64),
    "linear_attention-64-128-packed": dict(
        op="linear_attention", B=4, T=4000, H=16, K=64, V=128, decay="token", packed=True),
    "gated_delta_rule-qwen3-next-80b": dict(
        op="gated_delta_rule", T=32768, heads=16, value_heads=32, K=128, V=128),
    "gated_delta_rule-qwen3-next-80b-packed": dict(
        op="gated_delta_rule", T=32768, heads=16, value_heads=32, K=128, V=128, packed=True),
    "gated_delta_rule-jet-nemotron-2b-packed": dict(
        op="gated_delta_rule", T=8192, heads=12, value_heads=12, K=96, V=256, packed=True),
    "gated_delta_rule-64-packed": dict(
        op="gated_delta_rule", B=4, T=4000, heads=16, value_heads=16, K=64, V=64, packed=True),
    "chunk_sparse_attention-hsa-240m": dict(
        op="chunk_sparse_attention", T=4096, H=16, G=1, K=64, J=8),
    "chunk_sparse_attention-hsa-345m-joint": dict(
        op="chunk_sparse_attention", T=8192, H=16, G=1, K=64, J=32, joint=True),
    "chunk_sparse_attention-128": dict(
        op="chunk_sparse_attention", T=8192, H=32, G=8, K=128, J=16),
    "chunk_sparse_attention-64-heads": dict(
        op="chunk_sparse_attention", T=4096, H=64, G=1, K=128, J=8, joint=True),
    "chunk_topk-hsa-240m": dict(op="chunk_topk", T=4096, G=1, R=768, k=8),
    "chunk_topk-hsa-345m-packed-noise": dict(
        op="chunk_topk", T=8192, G=1, R=1024, k=32, packed=True, noise=True),
    "chunk_topk-64-slots": dict(op="chunk_topk", T=65536, G=1, R=64, k=64),
}
RESULTS = pathlib.Path(__file__).parents[1] / "docs/results/static_kernels_gpu"
PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"

# GpuTargetConfigProto: of an H100, what the compiler asks for.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.9
  device_memory_size: 84942979072 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

PTX = {  # column -> what its instructions begin with
    "wgmma": r"wgmma\.mma_async", "tma_in": r"cp\.async\.bulk\.tensor\.\dd\.shared",
    "tma_out": r"cp\.async\.bulk\.tensor\.\dd\.global", "exp": r"ex2\.", "ldsm": "ldmatrix",
    "stsm": "stmatrix", "load_shared": r"ld\.shared", "store_shared": r"st\.shared",
    "fp32": r"(?:fma|mul|add|sub)\.(?:rn\.)?(?:ftz\.)?f32", "barrier": r"bar\.|barrier\.",
}
SASS = ("HGMMA UTMALDG UTMASTG LDL STL MUFU FMUL FFMA FADD LDSM STSM LDS STS BAR SYNCS").split()


def missing() -> str | None:
    """What is not installed that compiling without a GPU needs."""
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        return f"neither of {', '.join(PLUGINS)} is installed"
    return None if _tool("ptxas") else "no ptxas in the nvidia packages (nvidia-cuda-nvcc-cu12)"


def _tool(name) -> str | None:
    """A program of the installed nvidia packages."""
    package = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations if package else ()
    found = (path for root in roots for path in glob.glob(f"{root}/*/bin/{name}"))
    return next(found, None)


def meter(function, arguments) -> dict[str, dict]:
    """Figures of every Mosaic GPU kernel in function, compiled for an H100.

    In a process of its own: the environment is read once, and the compiler may end the process.
    """
    ptxas = _tool("ptxas")
    folders = {os.path.dirname(tool) for name in ("ptxas", "nvdisasm") if (tool := _tool(name))}
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ["PATH"]])
    os.environ["XLA_FLAGS"] = (
        f"--xla_gpu_cuda_data_dir={os.path.dirname(os.path.dirname(ptxas))} "
        "--xla_gpu_autotune_level=0")
    with tempfile.TemporaryDirectory() as dump:
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
        _compile(function, arguments)
        return {_name(path): _figures(path) for path in sorted(pathlib.Path(dump).glob("*.ptxas"))}


def _compile(function, arguments):
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    # Mosaic lowers for the default device's architecture.
    with jax.set_mesh(mesh), jax.default_device(topology.devices[0]):
        jax.jit(function).trace(*arguments).lower().compile()


def _name(path):
    return re.sub(r"_\d+$", "", path.stem)


def _figures(path) -> dict:
    text = path.read_text()
    number = lambda pattern, text: int(re.search(pattern, text)[1])
    registers = number(r"Used (\d+) registers", text)
    # Lowering and compiling number the kernels differently.
    resources = next(path.parent.glob(f"{_name(path)}_*.resources.txt")).read_text()
    shared = number(r"smem_scratch_bytes=(\d+)", resources)
    threads = 128  # one warpgroup
    figures = dict(
        registers=registers,
        spilled_bytes=number(r"(\d+) bytes spill stores", text)
        + number(r"(\d+) bytes spill loads", text),
        shared_bytes=shared,
        # An SM has 65536 registers and 228 kB of shared memory, 1 kB of it the system's per block.
        blocks_per_sm=min(65536 // (-(-registers // 8) * 8 * threads), 233472 // (shared + 1024)),
        ptx=_count(PTX, r"(?<![\w.])(?:{})", path.with_suffix(".ptx").read_text()),
    )
    if sass := glob.glob(f"{path.with_suffix('')}.sass*"):
        figures["sass"] = _count(
            {name: name for name in SASS}, r"\b{}\b", pathlib.Path(sass[0]).read_text())
    return figures


def _count(patterns, line, text) -> dict[str, int]:
    return {name: len(re.findall(line.format(pattern), text))
            for name, pattern in patterns.items()}


def linear_attention(B=1, *, T, H, K, V, decay="heads", packed=False, dtype="bfloat16",
                     implementation="gpu"):
    """The op's outputs and gradients as a function, and what to call it with."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear_attention import linear_attention
    from pallas_kernels.linear_attention.decay import alibi_slopes

    array = jax.ShapeDtypeStruct
    tokens = array((B, T, H, K), dtype)
    arrays = dict(q=tokens, k=tokens, v=array((B, T, H, V), dtype),
                  initial_state=array((B, H, K, V), jnp.float32))
    if decay == "token":
        arrays["decay"] = array((B, T, H), jnp.float32)
    cotangents = arrays["v"], arrays["initial_state"]

    def function(arrays, segments, cotangents):
        op = functools.partial(
            linear_attention, segments=segments, output_final_state=True,
            implementation=implementation)
        arrays = {"decay": -alibi_slopes(H)} | arrays
        constant = {"decay": arrays.pop("decay")} if decay == "heads" else {}
        out, vjp = jax.vjp(lambda arrays: op(**arrays, **constant), arrays)
        return out, vjp(cotangents)

    return function, (arrays, array((B, T), jnp.int32) if packed else None, cotangents)


def gated_delta_rule(B=1, *, T, heads, value_heads, K, V, packed=False):
    """The same of the gated delta rule."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.gated_delta_rule import gated_delta_rule
    from pallas_kernels.gated_delta_rule.shapes import Shape

    arrays = Shape(heads, value_heads, K, V).arrays(B, T)
    arrays["initial_state"] = jax.ShapeDtypeStruct((B, value_heads, K, V), jnp.float32)
    cotangents = arrays["v"], arrays["initial_state"]

    def function(arrays, segments, cotangents):
        op = functools.partial(
            gated_delta_rule, segments=segments, output_final_state=True, implementation="gpu")
        out, vjp = jax.vjp(lambda arrays: op(**arrays), arrays)
        return out, vjp(cotangents)

    segments = jax.ShapeDtypeStruct((B, T), jnp.int32) if packed else None
    return function, (arrays, segments, cotangents)


def chunk_sparse_attention(*, T, H, G, K, J, joint=False):
    """The same of attention over chosen chunks of 64 keys."""
    import jax

    from pallas_kernels.chunk_sparse_attention import chunk_sparse_attention
    from pallas_kernels.chunk_sparse_attention.shapes import Shape

    arrays = Shape(H, G, K, J, chunk_size=64, T=T).arrays(B=1)
    indices, cotangent = arrays.pop("indices"), arrays["q"]
    if joint:
        del arrays["weights"]

    def function(arrays, indices, cotangent):
        op = functools.partial(
            chunk_sparse_attention, indices=indices, chunk_size=64, implementation="gpu")
        out, vjp = jax.vjp(lambda arrays: op(**arrays), arrays)
        return out, vjp(cotangent)

    return function, (arrays, indices, cotangent)


def chunk_topk(*, T, G, R, k, packed=False, noise=False):
    """The choice of chunks of 64 tokens; its gradient has no kernel."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.chunk_topk import chunk_topk
    from pallas_kernels.chunk_topk.shapes import Shape

    def function(arrays, documents):
        key = jax.random.key(0) if noise else None
        return chunk_topk(**arrays, **documents, k=k, chunk_size=64, noise_key=key,
                          implementation="gpu")

    ids = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)
    documents = dict(segments=ids(T), chunk_segments=ids(T // 64)) if packed else {}
    return function, (Shape(G, R, k, 64, T).arrays(B=1), documents)


OPS = dict(linear_attention=linear_attention, gated_delta_rule=gated_delta_rule,
           chunk_sparse_attention=chunk_sparse_attention, chunk_topk=chunk_topk)


def measure(case: str) -> dict[str, dict]:
    options = dict(CASES[case])
    return meter(*OPS[options.pop("op")](**options))


def run(case: str) -> dict[str, dict]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, case], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    import jax

    text = subprocess.run([_tool("ptxas"), "--version"], capture_output=True, text=True).stdout
    return dict(jax=jax.__version__, ptxas=re.search(r"V([\d.]+)", text)[1])


def table(results, versions) -> str:
    columns = ["registers", "spilled_bytes", "shared_bytes", "blocks_per_sm", *PTX]
    lines = [
        "# Hopper kernels as compiled",
        "",
        f"jax {versions['jax']}, ptxas {versions['ptxas']}, sm_90a; no GPU was used. "
        "`python benchmarks/static_kernels_gpu.py`",
        "",
        "Instructions are PTX, a loop's body counted once. Tile: chunks of 64 tokens, 64 columns.",
        "",
        f"| case | kernel | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for case, kernels in results.items():
        for kernel, figures in kernels.items():
            cells = [str((figures | figures["ptx"])[column]) for column in columns]
            lines.append(f"| {case} | {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    if reason := missing():
        raise SystemExit(f"cannot compile for a GPU: {reason}")
    asked = sys.argv[1] if len(sys.argv) > 1 else None
    if asked in CASES:
        print(json.dumps(measure(asked)))
        return
    if asked not in (None, *OPS):
        raise SystemExit(f"{asked!r} is neither an op nor a case: {', '.join([*OPS, *CASES])}")
    found, results = versions(), {}
    if asked:
        before = json.loads(RESULTS.with_suffix(".json").read_text())
        if before["versions"] != found:
            raise SystemExit(f"{found} here, {before['versions']} there: measure all cases")
        results = before["results"]
    for case, options in CASES.items():
        if asked in (None, options["op"]):
            results[case] = run(case)
            print(case, {name: figures["registers"] for name, figures in results[case].items()})
    RESULTS.with_suffix(".json").write_text(
        json.dumps(dict(versions=found, results=results), indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results, found))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    main()
