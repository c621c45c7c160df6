"""Triton kernels called from JAX without a GPU: in Triton's interpreter, or not at all.

The interpreter takes PyTorch's tensors, and it multiplies bfloat16 as if its bits were integers.
"""

import importlib
import importlib.util
import os
import sys
import types
from unittest import mock

import jax
import ml_dtypes
import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is first imported


def missing() -> str | None:
    """What is not installed that interpreting needs."""
    absent = [name for name in ("triton", "torch") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def interpreted(monkeypatch, name):
    """The module of that name, imported with a jax-triton that interprets every kernel."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast)
    return _imported(monkeypatch, name, jax_triton())


def traced(monkeypatch, name, version=(1, 0, 0)):
    """The module of that name where Triton need not be: its kernels are called, but never run."""
    for module in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, module, mock.MagicMock())
    return _imported(monkeypatch, name, jax_triton(version))


def _imported(monkeypatch, name, jax_triton):
    monkeypatch.setitem(sys.modules, "jax_triton", jax_triton)
    package = sys.modules[name.rpartition(".")[0]]
    for module in (name, f"{name}_kernels"):  # anew, and once more after the test
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(package, module.rpartition(".")[2], None, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
    return importlib.import_module(name)


def jax_triton(version=(1, 0, 0)):
    module = types.ModuleType("jax_triton")
    module.__version__, module.__version_info__ = ".".join(map(str, version)), version
    module.triton_call = triton_call
    return module


def triton_call(*arrays, kernel, name, out_type, grid, num_warps, num_stages, **constants):
    def run(*arrays):
        # NaN where a kernel writes nothing: it must write all that is read.
        out = [np.full(x.shape, np.nan, x.dtype) for x in out_type]
        kernel[grid](*map(_tensor, [np.array(x) for x in arrays]), *map(_tensor, out), **constants)
        return tuple(out)

    return jax.pure_callback(run, out_type, *arrays)


def _tensor(array):
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numbers(handle):
    return handle.data.view(ml_dtypes.bfloat16) if str(handle.dtype) == "bf16" else handle.data


def _dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    from triton.runtime.interpreter import TensorHandle

    a, b = (_numbers(x).astype(np.float32) for x in (a, b))
    return TensorHandle(a @ b + d.data, d.dtype.scalar)


def _cast(builder, source, target):
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    if str(target.scalar) == "bf16":
        data = _numbers(source).astype(ml_dtypes.bfloat16).view(np.uint16)
    else:
        data = _numbers(source).astype(_get_np_dtype(target))
    return TensorHandle(data, target.scalar)
