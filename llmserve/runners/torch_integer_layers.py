"""Linear layers of a GPU's model that keep a quantized folder's integers and codes.

Every quantized layer is taken: int8 and int4 groups, with zero points or an activation order or
neither, and bitsandbytes' nf4, fp4 and LLM.int8(). The parts of a joined layer (`qkv_proj`,
`gate_up_proj`) that are alike are one matrix, others a matrix each; some may be floating-point.

Shapes: N outputs, K inputs; leading axes are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.layers import Linear
from ..model.transformer import Transformer
from ..model.weights import canonical_parts
from ..quant.bnb import BitsAndBytesLinear
from ..quant.dtypes import to_float32
from ..quant.groups import QuantizedLinear
from ..quant.layout import AnyQuantizedLinear
from ..quant.packing import pack_int4
from ..weight_source import WeightSource
from .torch_triton_linear import CODE_BLOCK, code_linear, integer_linear

__all__ = ["IntegerLinear", "Part", "keep_integers"]

Part = AnyQuantizedLinear | Tensor
"""Rows of one projection: quantized, or [N, K] in the type of the arithmetic."""


class IntegerLinear(nn.Module):
    """y = x Wᵀ + b, with W [N, K] as it is stored."""

    def __init__(
        self, parts: Sequence[Part], bias: nn.Parameter | None, device: torch.device
    ) -> None:
        """Put the rows of `parts` one behind the other."""
        super().__init__()
        self.num_outputs = sum(part.shape[0] for part in parts)
        self.num_weights = self.num_outputs * parts[0].shape[1]
        matrices = list(_matrices(parts, device))
        self.matrices = nn.ModuleList(matrices)
        self.bias = bias
        stops = np.cumsum([0, *(matrix.num_outputs for matrix in matrices)]).tolist()
        self._rows = [slice(*ends) for ends in itertools.pairwise(stops)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(rows), self.num_outputs)
        for matrix, part in zip(self.matrices, self._rows, strict=True):
            matrix(rows, out[:, part], None if self.bias is None else self.bias[part])
        return out.view(*x.shape[:-1], -1)


def keep_integers(
    model: Transformer, checkpoint: WeightSource, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace layers that are quantized, or have a part that is; biases are still to be loaded.

    Args:
        model: On the device `meta`.
        checkpoint: The folder that it is loaded from.
        device: Where the weights go.
        dtype: Type of the arithmetic, and of parts that are floating-point.

    Raises:
        CheckpointError: a quantized layer is malformed.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not Linear or module is model.lm_head:
            continue  # a gate decides by its own rounding, the output layer is read as a matrix
        names = [
            part for part, _ in canonical_parts(f"{name}.weight", len(module.weight), model.config)
        ]
        if any(checkpoint.is_quantized(part) for part in names):
            parts = [_part(checkpoint, part, dtype) for part in names]
            model.set_submodule(name, IntegerLinear(parts, module.bias, device))


class _IntegerMatrix(nn.Module):
    """Rows of one form in integers, their scales, zero points and groups of inputs."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(self, parts: Sequence[QuantizedLinear], device: torch.device) -> None:
        super().__init__()
        first = parts[0]
        values = np.concatenate([part.values for part in parts])
        self.num_outputs = len(values)
        self.group_size = first.group_size or first.shape[1]
        integers = pack_int4(values) if first.bits == 4 else values
        scales = torch.from_numpy(np.concatenate([part.scales for part in parts]))
        zeros = [part.zeros for part in parts if part.zeros is not None]
        order = first.group_of_input
        self.register_buffer("integers", torch.from_numpy(integers).to(device))
        self.register_buffer("scales", scales.to(device, getattr(torch, first.scale_dtype)))
        self.register_buffer(
            "zeros", torch.from_numpy(np.concatenate(zeros)).to(device) if zeros else None
        )
        self.register_buffer(
            "order", None if order is None else torch.from_numpy(order.copy()).to(device)
        )

    def forward(self, x: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Fill `out` [T, N] with the products of rows `x` [T, K]."""
        integer_linear(
            x, self.integers, self.scales, self.group_size, out=out, zeros=self.zeros,
            order=self.order, bias=bias,
        )  # fmt: skip


class _CodeMatrix(nn.Module):
    """Rows in bitsandbytes' 4 bits, with one code book; double quantization is undone."""

    codes: Tensor
    scales: Tensor
    book: Tensor

    def __init__(self, parts: Sequence[BitsAndBytesLinear], device: torch.device) -> None:
        super().__init__()
        self.num_outputs = sum(part.shape[0] for part in parts)
        codes = np.concatenate([part.tensors["weight"].data.reshape(-1) for part in parts])
        scales = np.concatenate([part.block_scales() for part in parts])
        self.register_buffer("codes", torch.from_numpy(codes).to(device))
        self.register_buffer("scales", torch.from_numpy(scales).to(device))
        self.register_buffer("book", torch.from_numpy(_book(parts[0]).copy()).to(device))

    def forward(self, x: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Fill `out` [T, N] with the products of rows `x` [T, K]."""
        code_linear(x, self.codes, self.scales, self.book, out=out, bias=bias)


class _FloatMatrix(nn.Module):
    """Rows in the type of the arithmetic, among others that are not."""

    weight: Tensor

    def __init__(self, parts: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        self.num_outputs = sum(len(part) for part in parts)
        self.register_buffer("weight", torch.cat(list(parts)).to(device))

    def forward(self, x: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Fill `out` [T, N] with the products of rows `x` [T, K]."""
        out.copy_(F.linear(x, self.weight, bias))


def _matrices(
    parts: Sequence[Part], device: torch.device
) -> Iterator[_IntegerMatrix | _CodeMatrix | _FloatMatrix]:
    """Neighbours that are alike together."""
    for _, numbered in itertools.groupby(enumerate(parts), lambda pair: _form(*pair)):
        alike = [part for _, part in numbered]
        integers = [part for part in alike if isinstance(part, QuantizedLinear)]
        codes = [part for part in alike if isinstance(part, BitsAndBytesLinear)]
        floats = [part for part in alike if isinstance(part, Tensor)]
        if floats:
            yield _FloatMatrix(floats, device)
        else:
            yield _IntegerMatrix(integers, device) if integers else _CodeMatrix(codes, device)


def _form(index: int, part: Part) -> Hashable:
    """What neighbours have in common that can be one matrix."""
    if isinstance(part, Tensor):
        return part.dtype
    if isinstance(part, BitsAndBytesLinear):
        out, width = part.shape
        # Scales are counted over the whole matrix: the next one must begin with a new one.
        own = index if out * width % CODE_BLOCK else None
        return part.form, _book(part).tobytes(), own
    order = None if part.group_of_input is None else part.group_of_input.tobytes()
    return part.bits, part.group_size, part.scale_dtype, part.zeros is None, order


def _book(part: BitsAndBytesLinear) -> np.ndarray:
    return to_float32(part.tensors["weight.quant_map"])


def _part(checkpoint: WeightSource, name: str, dtype: torch.dtype) -> Part:
    """One projection; LLM.int8() is int8 with one scale for each row."""
    linear = checkpoint.linear(name)
    if isinstance(linear, np.ndarray):
        return torch.from_numpy(linear.copy()).to(dtype)
    if isinstance(linear, BitsAndBytesLinear) and linear.form.kind == "int8":
        return linear.as_integers()
    return linear
