"""The Hopper kernels of attention over chosen chunks without a GPU: numbers, races, refusals."""

import jax
import pytest
import test_chunk_sparse_attention as table

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import hopper_interpreter  # noqa: E402

from pallas_kernels.chunk_sparse_attention import gpu  # noqa: E402

interprets = pytest.mark.skipif(
    not hopper_interpreter.interprets(),
    reason=f"jax {jax.__version__} has no interpret mode for Mosaic GPU")
CASES = [name for name in table.CASES if name != "no-memory"]
DEFAULT = ("one-token",)


def check(name):
    arrays, indices, do, options = table.make(name, **table.CASES[name])
    got = table.run(table.narrowed(arrays, "bfloat16"), indices, do, options, "gpu")
    table.assert_close(got, table.expected(name, "bfloat16"), "bfloat16")


@interprets
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
             for name in CASES])
def test_gpu_is_the_reference_in_interpret_mode(name, monkeypatch):
    monkeypatch.setattr(gpu, "BLOCKS", 20)  # two to a chunk
    with hopper_interpreter.interpreted(monkeypatch):
        check(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_the_reference_on_a_gpu(name):
    check(name)
