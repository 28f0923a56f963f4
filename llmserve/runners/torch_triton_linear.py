"""Products with weights of 8 and 4 bits in Triton: what the folder holds stays so in memory.

A program makes a tile of outputs: it reads integers or codes and scales of some inputs, turns them
into numbers of the activations' type, as dequantizing at load would, and multiplies on tensor cores
with float32 sums. What bounds a decode is the reading of weights; that takes a byte or half of one
each.

Shapes: T rows, N outputs, K inputs, groups of inputs share a scale.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CODE_BLOCK", "code_linear", "integer_linear"]

CODE_BLOCK = 64
"""Codes that share a scale, counted over the whole matrix row by row."""

_DECODE_ROWS, _PREFILL_ROWS = 16, 64
_OUTPUTS = 64
_INPUT_BYTES = 128
"""Of a row's inputs that are read at once: more of float32 does not fit into registers."""


def integer_linear(
    x: Tensor, integers: Tensor, scales: Tensor, group_size: int, *, out: Tensor,
    zeros: Tensor | None = None, order: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Put x Wᵀ + b into `out`, with W = (integers - zeros) * scales.

    Args:
        x: [T, K], float32, bfloat16 or float16.
        integers: int8 [N, K], or int32 words [N, ceil(K / 8)] of eight int4, each plus 8, the first
            lowest.
        scales: [N, groups].
        group_size: Inputs that share a scale, where they are one after another.
        out: [T, N], in the type of `x`; rows may lie apart.
        zeros: int8 [N, groups]; None: all 0.
        order: int32 [K], the group of each input; None: one after another.
        bias: b [N], in the type of `x`; None: 0.
    """
    _launch(
        x, out, bias, integers, scales, zeros, order, None, integers.stride(0), scales.stride(0),
        BITS=4 if integers.dtype == torch.int32 else 8, GROUP=group_size,
    )  # fmt: skip


def code_linear(
    x: Tensor, codes: Tensor, scales: Tensor, book: Tensor, *, out: Tensor,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Put x Wᵀ + b into `out`, with W = book[codes] * scales, in bitsandbytes' 4 bits.

    Args:
        x: [T, K], float32, bfloat16 or float16.
        codes: uint8 [ceil(N K / 2)], two to a byte, row by row, the first in the upper half.
        scales: float32 [ceil(N K / CODE_BLOCK)].
        book: float32 [16].
        out: [T, N], in the type of `x`; rows may lie apart.
        bias: b [N], in the type of `x`; None: 0.
    """
    _launch(x, out, bias, codes, scales, None, None, book, 0, 0, BITS=4, GROUP=CODE_BLOCK)


def _launch(x: Tensor, out: Tensor, bias: Tensor | None, *weights: Any, **form: int) -> None:
    num_rows, width = x.shape
    num_outputs = out.shape[1]
    rows = _DECODE_ROWS if num_rows <= _DECODE_ROWS else _PREFILL_ROWS
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_outputs, _OUTPUTS))
    if num_rows:
        _linear_kernel[grid](
            x.contiguous(), out, bias, *weights, num_rows, num_outputs, width, out.stride(0),
            ROWS=rows, OUTPUTS=_OUTPUTS, INPUTS=_INPUT_BYTES // x.itemsize, num_warps=8,
            enable_fp_fusion=True, **form,
        )  # fmt: skip


@triton.jit
def _integer_tile(integers, scales, zeros, order, outputs, inputs, is_weight, integers_stride,
                  scales_stride, BITS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Weights [OUTPUTS, INPUTS] in float32."""
    line = outputs[:, None] * integers_stride
    if BITS == 4:
        words = tl.load(integers + line + (inputs // 8)[None, :], mask=is_weight, other=0)
        values = (((words >> (inputs % 8 * 4)[None, :]) & 15) - 8).to(tl.float32)
    else:
        values = tl.load(integers + line + inputs[None, :], mask=is_weight, other=0).to(tl.float32)
    if order is None:
        groups = outputs[:, None] * scales_stride + (inputs // GROUP)[None, :]
    else:
        groups = tl.load(order + inputs[None, :], mask=is_weight, other=0)
        groups = outputs[:, None] * scales_stride + groups
    if zeros is not None:
        values -= tl.load(zeros + groups, mask=is_weight, other=0).to(tl.float32)
    return values * tl.load(scales + groups, mask=is_weight, other=0.0).to(tl.float32)


@triton.jit
def _code_tile(codes, scales, book, outputs, inputs, is_weight, width, BLOCK: tl.constexpr):
    """Weights [OUTPUTS, INPUTS] in float32."""
    places = outputs[:, None] * width + inputs[None, :]
    pairs = tl.load(codes + (places >> 1), mask=is_weight, other=0).to(tl.int32)
    chosen = tl.where((places & 1) == 0, pairs >> 4, pairs & 15)
    values = tl.load(book + chosen, mask=is_weight, other=0.0)
    return values * tl.load(scales + places // BLOCK, mask=is_weight, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])  # for any number of rows there is one
def _linear_kernel(x, out, bias, weights, scales, zeros, order, book, weights_stride, scales_stride,
                   num_rows, num_outputs, width, out_stride, BITS: tl.constexpr,
                   GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
                   INPUTS: tl.constexpr):  # fmt: skip
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
        is_weight = is_output & is_input
        if book is None:
            tile = _integer_tile(weights, scales, zeros, order, outputs, inputs, is_weight,
                                 weights_stride, scales_stride, BITS, GROUP)  # fmt: skip
        else:
            tile = _code_tile(weights, scales, book, outputs, inputs, is_weight, width, GROUP)
        total += tl.dot(part, tl.trans(tile.to(part.dtype)), input_precision="ieee")
    is_column = (outputs < num_outputs)[None, :]
    if bias is not None:
        total += tl.load(bias + outputs[None, :], mask=is_column, other=0.0).to(tl.float32)
    place = rows[:, None] * out_stride + outputs[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_row & is_column)
