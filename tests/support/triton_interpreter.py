"""Triton kernels on the CPU: importing this module has them interpreted, or skips the tests.

Triton decides when a kernel is decorated, its own library's when it is imported. So tests import
this before the module with the kernels.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_multiply = InterpreterBuilder.create_dot


def _create_dot(self, a, b, *rest):
    """The interpreter keeps bfloat16 as its bits, and would multiply those as whole numbers."""
    return _multiply(self, _widened(a), _widened(b), *rest)


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


InterpreterBuilder.create_dot = _create_dot
