"""What lies between the products of a block, in Triton: residual sums with their norms, gates.

Such operations cost what they read and write. torch walks memory once for each sum, each norm and
each change of type; here it is walked once for all of them. Arithmetic is float32; results are
rounded where the model's own operations keep numbers: what is added, the stream, what is read on.

Sources: RMSNorm arXiv 1910.07467; GELU arXiv 1606.08415; gated units arXiv 2002.05202.

Shapes: T rows, E width, N width behind a gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Norm", "add_and_normalize", "gate", "inverse_root", "normalize_rows"]

_GATE_PLACES = 1024
_MOST_WARPS = 16


class Norm(NamedTuple):
    """An RMSNorm: x / sqrt(mean(x²) + eps) * (weight + offset)."""

    weight: Tensor  # [E]
    eps: float
    offset: float


def add_and_normalize(
    stream: Tensor, added: Tensor | None, *, after: Norm | None, before: Norm | None
) -> tuple[Tensor, Tensor]:
    """One joint of the residual stream: what a half of a block adds, what the next one reads.

    Args:
        stream: [T, E], contiguous.
        added: [T, E] put onto the stream, contiguous; None: nothing is.
        after: The norm that `added` passes first; None: none.
        before: The norm of what is read on; None: the stream itself is read.

    Returns:
        The new stream and what is read on, each [T, E]; the same tensor where there is no `before`,
        and `stream` itself where nothing is added.
    """
    if added is None and before is None:
        return stream, stream
    new = stream if added is None else torch.empty_like(stream)
    out = new if before is None else torch.empty_like(stream)
    num_rows, width = stream.shape
    some = before or after
    if num_rows:
        _joint_kernel[(num_rows,)](
            stream, added, new, out, stream.stride(0), after and after.weight,
            before and before.weight, 0.0 if some is None else some.eps,
            OFFSET=0.0 if some is None else some.offset, **_row_constants(width),
        )  # fmt: skip
    return new, out


def normalize_rows(x: Tensor, norm: Norm) -> Tensor:
    """Rows [T, E], which may lie apart, each value beside the next → normalized rows [T, E]."""
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width)
    if num_rows:
        _joint_kernel[(num_rows,)](
            x, None, x, out, x.stride(0), None, norm.weight, norm.eps, OFFSET=norm.offset,
            **_row_constants(width),
        )  # fmt: skip
    return out


def gate(both: Tensor, *, is_silu: bool) -> Tensor:
    """Gates and inputs [T, 2 N], contiguous → activated gates times inputs, [T, N].

    The activation is SiLU, or GELU in its tanh form.
    """
    num_rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(num_rows, width)
    if num_rows:
        _gate_kernel[num_rows, triton.cdiv(width, _GATE_PLACES)](
            both, out, N=width, IS_SILU=is_silu, PLACES=_GATE_PLACES, enable_fp_fusion=True
        )
    return out


def _row_constants(width: int) -> dict[str, int]:
    places = triton.next_power_of_2(width)
    warps = min(_MOST_WARPS, max(1, places // 512))
    return {"E": width, "WIDTH": places, "num_warps": warps, "enable_fp_fusion": True}


@triton.jit
def inverse_root(squares, count: tl.constexpr, eps):
    """1 / sqrt(mean + eps) of sums of `count` squares, each operation rounded to nearest."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares / count + eps))


@triton.jit
def _normalized(x, weight, places, eps, OFFSET: tl.constexpr, E: tl.constexpr):
    """One row [WIDTH] in float32; places from E on hold zeros and stay zeros."""
    factors = tl.load(weight + places, mask=places < E, other=0.0).to(tl.float32) + OFFSET
    return x * inverse_root(tl.sum(x * x, 0), E, eps) * factors


@triton.jit
def _joint_kernel(stream, added, new, out, stream_stride, after, before, eps,
                  OFFSET: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    is_there = places < E
    kept = out.dtype.element_ty
    x = tl.load(stream + row * stream_stride + places, mask=is_there, other=0.0).to(tl.float32)
    if added is not None:
        y = tl.load(added + row * E + places, mask=is_there, other=0.0).to(tl.float32)
        if after is not None:
            y = _normalized(y, after, places, eps, OFFSET, E).to(kept).to(tl.float32)
        x = (x + y).to(kept).to(tl.float32)
        tl.store(new + row * E + places, x.to(kept), mask=is_there)
    if before is not None:
        x = _normalized(x, before, places, eps, OFFSET, E)
        tl.store(out + row * E + places, x.to(kept), mask=is_there)


@triton.jit
def _gate_kernel(both, out, N: tl.constexpr, IS_SILU: tl.constexpr,
                 PLACES: tl.constexpr):  # fmt: skip
    """A part of one row. GELU's 0.5 (1 + tanh z) is 1 / (1 + e^-2z), so both are x times it."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    is_there = places < N
    x = tl.load(both + row * (2 * N) + places, mask=is_there, other=0.0).to(tl.float32)
    y = tl.load(both + row * (2 * N) + N + places, mask=is_there, other=0.0).to(tl.float32)
    turns = x
    if not IS_SILU:
        turns = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    activated = x / (1.0 + tl.exp(-turns))
    tl.store(out + row * N + places, (activated * y).to(out.dtype.element_ty), mask=is_there)
