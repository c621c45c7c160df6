"""Triton kernels called from JAX, in Triton's interpreter: a jax-triton that needs no GPU.

The interpreter takes PyTorch's tensors, and it multiplies bfloat16 as if its bits were integers.
"""

import importlib
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is first imported

import jax
import ml_dtypes
import numpy as np


def interpreted(monkeypatch, name):
    """The module of that name, imported anew with every Triton kernel interpreted."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast)
    monkeypatch.setitem(sys.modules, "jax_triton", jax_triton())
    forget(monkeypatch, name)
    return importlib.import_module(name)


def forget(monkeypatch, name):
    """What is imported of a module and of its kernels now goes when the test ends."""
    package, _, attribute = name.rpartition(".")
    for module in (attribute, f"{attribute}_kernels"):
        monkeypatch.delitem(sys.modules, f"{package}.{module}", raising=False)
        monkeypatch.setattr(sys.modules[package], module, None, raising=False)


def jax_triton(version=(0, 4, 1)):
    module = types.ModuleType("jax_triton")
    module.__version__, module.__version_info__ = ".".join(map(str, version)), version
    module.triton_call = triton_call
    return module


def triton_call(*arrays, kernel, out_type, grid, num_warps, num_stages, **constants):
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
