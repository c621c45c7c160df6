"""The GPU kernels compiled for Hopper by NVIDIA's own assembler, with no GPU."""

import pytest

from benchmarks import static_kernels_gpu

DEFAULT = ("linear_attention-hypenet-9b-1m", "linear_attention-gla-packed",
           "gated_delta_rule-qwen3-next-80b-packed", "chunk_sparse_attention-128",
           "chunk_topk-hsa-345m-packed-noise")
KERNELS = dict(linear_attention={"_o", "_dq", "_dk", "_dv"},
               gated_delta_rule={"_solve", "_forward", "_states", "_dstates", "_gradients"},
               chunk_sparse_attention={"_forward", "_by_query", "_by_chunk"},
               chunk_topk={""})


@pytest.mark.skipif(static_kernels_gpu.missing() is not None,
                    reason=f"cannot compile for a GPU: {static_kernels_gpu.missing()}")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in DEFAULT else pytest.mark.slow)
             for case in static_kernels_gpu.CASES])
def test_kernels_compile_for_hopper_without_spills(case):
    op = static_kernels_gpu.CASES[case]["op"]
    kernels = static_kernels_gpu.run(case)
    assert {f"{op}{name}" for name in KERNELS[op]} <= kernels.keys()
    for name, figures in kernels.items():
        assert figures["spilled_bytes"] == 0, (name, figures)
        assert figures["registers"] <= 250, (name, figures)  # the limit is 255: a margin
        assert figures["ptx"]["wgmma"] and figures["ptx"]["tma_in"], (name, figures)
