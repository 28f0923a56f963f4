"""Triton kernels on the CPU: importing this module has them interpreted, or skips the tests.

`use_kernels` has a runner on the CPU take what a GPU's runner takes. Triton decides when a kernel
is decorated, its own library's when it is imported. So tests import this before the module with the
kernels.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from llmserve.quant.dtypes import StoredArray, from_float32, to_float32

_multiply = InterpreterBuilder.create_dot
_unary = InterpreterBuilder.unary_op
_convert = InterpreterBuilder.create_fp_to_fp


def _create_dot(self, a, b, *rest):
    """The interpreter keeps bfloat16 as its bits, and would multiply those as whole numbers."""
    return _multiply(self, _widened(a), _widened(b), *rest)


def _cast(self, src, dst_type):
    """It would also cut numbers off where GPUs round to nearest, and take integers for bits."""
    target, data = dst_type.scalar, _widened(src).data
    if target == tl.bfloat16:
        bits = from_float32(data.astype(np.float32), "bfloat16").data
        return TensorHandle(bits, target)
    return TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)


def _create_fp_to_fp(self, src, dst_type, rounding_mode):
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _cast(self, src, dst_type)
    return _convert(self, src, dst_type, rounding_mode)


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle(to_float32(StoredArray("bfloat16", x.data)), tl.float32)


def _unary_op(self, arg, op):
    """numpy would warn where an exponential is infinite, as it is meant to be."""
    with np.errstate(over="ignore"):
        return _unary(self, arg, op)


InterpreterBuilder.unary_op = _unary_op
InterpreterBuilder.create_dot = _create_dot
InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
InterpreterBuilder.cast_impl = _cast


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every torch runner computes with kernels, interpreted."""
    from llmserve.runners import torch_runner
    from llmserve.runners.torch_gpu_attention import GpuAttention, GpuTokenAttention

    monkeypatch.setattr(torch_runner, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch_runner, "attention_for", lambda device: GpuAttention)
    monkeypatch.setattr(torch_runner, "tile_attention_for", lambda device: GpuTokenAttention)
