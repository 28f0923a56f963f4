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
    inputs = _INPUT_BYTES // x.itemsize
    if scales.shape[1] == 1:  # one group, of as many inputs as there might be
        group_size = triton.cdiv(x.shape[1], inputs) * inputs
    _launch(
        x, out, bias, integers, scales, zeros, order, None, integers.stride(0), scales.stride(0),
        BITS=4 if integers.dtype == torch.int32 else 8, GROUP=group_size,
        RUN=0 if order is not None else _run(group_size, inputs),
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
    is_whole = x.shape[1] % CODE_BLOCK == 0
    _launch(
        x, out, bias, codes, scales, None, None, book, 0, 0, BITS=4, GROUP=CODE_BLOCK,
        RUN=_run(CODE_BLOCK, _INPUT_BYTES // x.itemsize) if is_whole else 0,
    )  # fmt: skip


def _run(group_size: int, inputs: int) -> int:
    """Inputs of a tile that share a scale wherever the tile begins; 0: that depends."""
    if group_size % inputs == 0:
        return inputs
    return group_size if inputs % group_size == 0 else 0


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
def _spread(x, COUNT: tl.constexpr):
    """[M, N] → [M, N * COUNT], each value COUNT times."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], COUNT))
    return tl.reshape(wide, (x.shape[0], x.shape[1] * COUNT))


@triton.jit
def _unpacked(packed, SHIFTS: tl.constexpr, PER_ITEM: tl.constexpr):
    """Items [M, N] → the four bits each holds, [M, N * PER_ITEM]; SHIFTS: 1 or -1, their order."""
    places = tl.arange(0, PER_ITEM)
    if SHIFTS < 0:
        places = PER_ITEM - 1 - places
    wide = (packed[:, :, None] >> (places * 4)[None, None, :]) & 15
    return tl.reshape(wide, (packed.shape[0], packed.shape[1] * PER_ITEM))


@triton.jit
def _integer_tile(integers, scales, zeros, order, outputs, first, width, integers_stride,
                  scales_stride, is_output, BITS: tl.constexpr, GROUP: tl.constexpr,
                  RUN: tl.constexpr, INPUTS: tl.constexpr):  # fmt: skip
    """Weights [OUTPUTS, INPUTS] in float32."""
    inputs = first + tl.arange(0, INPUTS)
    line = outputs[:, None] * integers_stride
    if BITS == 4:
        words = first // 8 + tl.arange(0, INPUTS // 8)
        is_word = is_output & (words * 8 < width)[None, :]
        packed = tl.load(integers + line + words[None, :], mask=is_word, other=0)
        values = (_unpacked(packed, 1, 8) - 8).to(tl.float32)
    else:
        is_weight = is_output & (inputs < width)[None, :]
        values = tl.load(integers + line + inputs[None, :], mask=is_weight, other=0).to(tl.float32)
    if RUN > 0:
        groups = first // GROUP + tl.arange(0, INPUTS // RUN)
        is_group = is_output & (groups * GROUP < width)[None, :]
        groups = groups[None, :]
    else:
        is_group = is_output & (inputs < width)[None, :]
        if order is None:
            groups = (inputs // GROUP)[None, :]
        else:
            groups = tl.load(order + inputs, mask=inputs < width, other=0)[None, :]
    there = outputs[:, None] * scales_stride + groups
    if zeros is not None:
        zero = tl.load(zeros + there, mask=is_group, other=0).to(tl.float32)
        values -= _spread(zero, RUN) if RUN > 0 else zero
    scale = tl.load(scales + there, mask=is_group, other=0.0).to(tl.float32)
    return values * (_spread(scale, RUN) if RUN > 0 else scale)


@triton.jit
def _code_tile(codes, scales, book, outputs, first, width, is_output, BLOCK: tl.constexpr,
               RUN: tl.constexpr, INPUTS: tl.constexpr):  # fmt: skip
    """Weights [OUTPUTS, INPUTS] in float32."""
    inputs = first + tl.arange(0, INPUTS)
    is_weight = is_output & (inputs < width)[None, :]
    start = outputs[:, None] * width + first
    if RUN > 0:  # rows are whole blocks
        pairs = start // 2 + tl.arange(0, INPUTS // 2)[None, :]
        chosen = _unpacked(tl.load(codes + pairs, mask=is_output, other=0), -1, 2)
        blocks = start // BLOCK + tl.arange(0, INPUTS // RUN)[None, :]
        scale = _spread(tl.load(scales + blocks, mask=is_output, other=0.0), RUN)
    else:
        places = start + tl.arange(0, INPUTS)[None, :]
        pairs = tl.load(codes + (places >> 1), mask=is_weight, other=0)
        chosen = tl.where((places & 1) == 0, pairs >> 4, pairs & 15)
        scale = tl.load(scales + places // BLOCK, mask=is_weight, other=0.0)
    return tl.load(book + chosen.to(tl.int32), mask=is_weight, other=0.0) * scale


@triton.jit(do_not_specialize=["num_rows"])  # for any number of rows there is one
def _linear_kernel(x, out, bias, weights, scales, zeros, order, book, weights_stride, scales_stride,
                   num_rows, num_outputs, width, out_stride, BITS: tl.constexpr,
                   GROUP: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr,
                   OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):  # fmt: skip
    """One tile [ROWS, OUTPUTS], over all inputs in ascending order."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    outputs = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    is_row, is_output = (rows < num_rows)[:, None], (outputs < num_outputs)[:, None]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, width, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        there = rows[:, None] * width + inputs[None, :]
        part = tl.load(x + there, mask=is_row & (inputs < width)[None, :], other=0.0)
        if book is None:
            tile = _integer_tile(weights, scales, zeros, order, outputs, first, width,
                                 weights_stride, scales_stride, is_output, BITS, GROUP, RUN,
                                 INPUTS)  # fmt: skip
        else:
            tile = _code_tile(weights, scales, book, outputs, first, width, is_output, GROUP, RUN,
                              INPUTS)  # fmt: skip
        total += tl.dot(part, tl.trans(tile.to(part.dtype)), input_precision="ieee")
    is_column = (outputs < num_outputs)[None, :]
    if bias is not None:
        total += tl.load(bias + outputs[None, :], mask=is_column, other=0.0).to(tl.float32)
    place = rows[:, None] * out_stride + outputs[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_row & is_column)
