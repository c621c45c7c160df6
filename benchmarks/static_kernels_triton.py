"""What the compiler makes of the Triton kernels: registers, spills, shared memory, products.

    python benchmarks/static_kernels_triton.py     # -> docs/results/static_kernels_triton.*
    python benchmarks/static_kernels_triton.py CASE CAPABILITY     # JSON on standard output

Compiles for A100 (sm_80) and for L4 and RTX 40 (sm_89), ptxas included, where no GPU is: needs
Triton alone (`pip install triton`), whose own ptxas it takes.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types

CASES = {
    "hypenet-2b": dict(T=32768, H=16, K=128, V=128),
    "wide-packed": dict(T=8192, H=8, K=256, V=256, decay="token", packed=True),
    "float32-packed": dict(
        T=8192, H=8, K=128, V=128, decay="token", packed=True, dtype="float32"),
}
CAPABILITIES = {80: "NVIDIA A100-SXM4-80GB", 89: "NVIDIA L4"}
RESULTS = pathlib.Path(__file__).parents[1] / "docs/results/static_kernels_triton"
COLUMNS = "registers", "spilled_bytes", "shared_bytes", "warps", "mma"


def missing() -> str | None:
    """What is not installed that compiling without a GPU needs."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def measure(case: str, capability: int) -> dict[str, dict]:
    """Figures of every kernel of the op's forward and backward, by name."""
    import triton

    figures = {}
    for name, (kernel, arrays, options, constants) in _launches(case, capability).items():
        source = triton.compiler.ASTSource(
            kernel, _signature(kernel, arrays, constants),
            constexprs={(kernel.arg_names.index(key),): x for key, x in constants.items()},
            # As jax-triton does: XLA's buffers are aligned.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arrays))})
        compiled = triton.compile(
            source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
            options=options)
        figures[name] = dict(
            _resources(compiled.asm["ptx"], capability), shared_bytes=compiled.metadata.shared,
            warps=options["num_warps"], mma=compiled.asm["ptx"].count("mma.sync"))
    return figures


def _launches(case, capability) -> dict[str, tuple]:
    """What the op gives to jax-triton, which need not be installed nor see a GPU."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    from benchmarks.static_kernels_gpu import linear_attention

    found = {}

    def triton_call(*arrays, kernel, name, out_type, grid, num_warps, num_stages, **constants):
        arrays = [x.dtype.name for x in (*arrays, *out_type)]
        found[name] = kernel, arrays, dict(num_warps=num_warps, num_stages=num_stages), constants
        return [jnp.zeros(x.shape, x.dtype) for x in out_type]

    recorder = types.ModuleType("jax_triton")
    recorder.triton_call, recorder.__version_info__ = triton_call, (1, 0, 0)
    sys.modules["jax_triton"] = recorder
    device = AbstractDevice(
        device_kind=CAPABILITIES[capability], num_cores=None, platform="cuda")
    function, arguments = linear_attention(**CASES[case], implementation="triton")
    with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        jax.eval_shape(function, *arguments)
    return found


def _signature(kernel, arrays, constants):
    types = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
    return {name: "constexpr" if name in constants else types[arrays[i]]
            for i, name in enumerate(kernel.arg_names)}


def _resources(ptx, capability):
    import triton

    ptxas = triton.knobs.nvidia.ptxas.path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        text = subprocess.run(
            [ptxas, "-v", f"--gpu-name=sm_{capability}", "-o", os.devnull, file.name],
            capture_output=True, text=True, check=True).stderr
    number = lambda pattern: int(re.search(pattern, text)[1])
    return dict(registers=number(r"Used (\d+) registers"),
                spilled_bytes=number(r"(\d+) bytes spill stores")
                + number(r"(\d+) bytes spill loads"))


def run(case: str, capability: int) -> dict[str, dict]:
    """`measure` in a process of its own, which interprets no kernel."""
    done = subprocess.run(
        [sys.executable, __file__, case, str(capability)], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "0"})
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results, versions) -> str:
    lines = [
        "# Triton kernels as compiled",
        "",
        f"triton {versions['triton']} and its ptxas, jax {versions['jax']}; no GPU was used. "
        "`python benchmarks/static_kernels_triton.py`",
        "",
        "`mma` counts mma.sync in PTX, a loop's body once. Registers are a thread's, of 32 a warp.",
        "",
        f"| case | sm | kernel | {' | '.join(COLUMNS)} |",
        "|---|---|---|" + "---:|" * len(COLUMNS),
    ]
    for row in results:
        cells = [row["case"], row["capability"], row["kernel"], *(row[name] for name in COLUMNS)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main():
    if reason := missing():
        raise SystemExit(f"cannot compile for a GPU: {reason}")
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    from importlib.metadata import version

    versions, results = {name: version(name) for name in ("triton", "jax")}, []
    for capability, case in itertools.product(CAPABILITIES, CASES):
        for kernel, figures in measure(case, capability).items():
            results.append(dict(case=case, capability=capability, kernel=kernel, **figures))
            print(results[-1], flush=True)
        RESULTS.with_suffix(".json").write_text(
            json.dumps(dict(versions=versions, results=results), indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(results, versions))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    main()
