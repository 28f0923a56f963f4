"""Products with int8 and int4 weights in Triton: integers stay integers in memory.

A program makes a tile of outputs: it reads the integers and scales of some inputs, turns them into
numbers of the activations' type, as dequantizing at load would, and multiplies on tensor cores with
float32 sums. What bounds a decode is the reading of weights; that takes a byte or half of one each.

Shapes: T rows, N outputs, K inputs, groups of inputs share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["integer_linear"]

_DECODE_ROWS, _PREFILL_ROWS = 16, 64
_OUTPUTS, _INPUTS = 64, 64


def integer_linear(x: Tensor, integers: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """x Wᵀ, with W = integers * scales.

    Args:
        x: [T, K], float32, bfloat16 or float16.
        integers: int8 [N, K], or int32 words [N, ceil(K / 8)] of eight int4, each plus 8, the first
            lowest.
        scales: [N, ceil(K / group_size)].
        group_size: Inputs that share a scale.

    Returns:
        [T, N], in the type of `x`.
    """
    num_rows, width = x.shape
    num_outputs = len(integers)
    out = x.new_empty(num_rows, num_outputs)
    rows = _DECODE_ROWS if num_rows <= _DECODE_ROWS else _PREFILL_ROWS
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_outputs, _OUTPUTS))
    if num_rows:
        _linear_kernel[grid](
            x.contiguous(), integers, scales, out, num_rows, num_outputs, width,
            integers.stride(0), scales.stride(0), BITS=4 if integers.dtype == torch.int32 else 8,
            GROUP=group_size, ROWS=rows, OUTPUTS=_OUTPUTS, INPUTS=_INPUTS,
        )  # fmt: skip
    return out


@triton.jit
def _linear_kernel(x, integers, scales, out, num_rows, num_outputs, width, integers_stride,
                   scales_stride, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):  # fmt: skip
    """One tile [ROWS, OUTPUTS], over all inputs in ascending order."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    outputs = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    is_row, is_output = (rows < num_rows)[:, None], (outputs < num_outputs)[:, None]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, width, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        is_input = (inputs < width)[None, :]
        there = rows[:, None] * width + inputs[None, :]
        part = tl.load(x + there, mask=is_row & is_input, other=0.0)
        line = outputs[:, None] * integers_stride
        is_weight = is_output & is_input
        if BITS == 4:
            words = tl.load(integers + line + (inputs // 8)[None, :], mask=is_weight, other=0)
            values = ((words >> (inputs % 8 * 4)[None, :]) & 15) - 8
        else:
            values = tl.load(integers + line + inputs[None, :], mask=is_weight, other=0)
        groups = outputs[:, None] * scales_stride + (inputs // GROUP)[None, :]
        scale = tl.load(scales + groups, mask=is_weight, other=0.0).to(tl.float32)
        weights = (values.to(tl.float32) * scale).to(part.dtype)
        total += tl.dot(part, tl.trans(weights), input_precision="ieee")
    place = rows[:, None] * num_outputs + outputs[None, :]
    is_place = is_row & (outputs < num_outputs)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_place)
