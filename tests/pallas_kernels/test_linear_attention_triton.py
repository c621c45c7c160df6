"""The Triton kernels without a GPU: numbers in Triton's interpreter, and what is refused."""

import pytest
import triton_interpreter
from linear_attention_cases import TABLE, assert_is_the_oracle

from pallas_kernels.linear_attention import linear_attention
NAME = "pallas_kernels.linear_attention.triton"

@pytest.mark.parametrize("case", list(TABLE)[:40])
def test_triton_is_the_oracle_in_the_interpreter(case, monkeypatch):
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    module = triton_interpreter.interpreted(monkeypatch, NAME)
    monkeypatch.setattr(module, "_refuse_target", lambda: None)
    assert_is_the_oracle(case, "triton")
