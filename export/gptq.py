"""GPTQ: rounding one input after another, each error made good by the inputs that follow.

For a layer with inputs X the error of the output is tr(E H Eᵀ), E the error of the weight and
H = X Xᵀ. Rounding input i leaves an error that the later columns of the Cholesky factor of H's
inverse say how to spread. Inputs are taken by falling H_ii (activation order) while each keeps the
scale of its place, found before (static groups): so any program reads the result.

Source: GPTQ, arXiv 2210.17323, sections 3.2 to 3.4; the order is that of its reference program.

Shapes: O outputs, K inputs, G groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmserve.quant.dtypes import Float32Array
from llmserve.quant.grids import Grid
from llmserve.quant.groups import GridRule, QuantizedLinear, linear_of, weight_grid

__all__ = ["output_error", "quantize_gptq"]

_DAMPING = 0.01  # of the mean of H's diagonal
_BLOCK = 128  # inputs whose errors are spread to all later ones at once


def quantize_gptq(
    weight: Float32Array, gram: Tensor, rule: GridRule, *, name: str = "weight"
) -> QuantizedLinear:
    """Quantize a weight [O, K] whose inputs have the Gram matrix `gram` [K, K].

    An input that was always 0 is rounded to nearest. Deterministic for one number of threads.
    Raises as `llmserve.quant.groups.quantize_rtn` does.
    """
    importance = gram.diagonal().numpy() if bool(gram.any()) else None
    grid = weight_grid(weight, rule, importance=importance, name=name)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(gram.double()[order][:, order])
    columns = order.tolist()
    left = torch.tensor(weight, dtype=torch.float64)[:, order]  # [O, K], as it will be rounded
    values = np.empty(weight.shape, np.int8)
    size = rule.group_size or weight.shape[1]
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        errors = _round_block(left, factor, columns, (start, stop), grid, size, values)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return linear_of(rule, values, grid)


def output_error(weight: Float32Array, rounded: Float32Array, gram: Tensor) -> float:
    """The squared error of a layer's output over all inputs behind `gram`: tr(E H Eᵀ)."""
    error = torch.from_numpy(rounded - weight).double()
    return float((error @ gram.double() * error).sum())


def _round_block(
    left: Tensor, factor: Tensor, columns: list[int], span: tuple[int, int], grid: Grid, size: int,
    values: npt.NDArray[np.int8],
) -> Tensor:  # fmt: skip
    """Round the inputs of a span into `values`; their errors, scaled, [O, span]."""
    start, stop = span
    errors = torch.zeros(len(left), stop - start, dtype=torch.float64)
    for place in range(start, stop):
        column, group = left[:, place], columns[place] // size
        integers = grid.round(column.numpy(), group)
        values[:, columns[place]] = integers
        off = column - torch.from_numpy(grid.values(integers, group))
        errors[:, place - start] = off / factor[place, place]
        rest = slice(place + 1, stop)
        left[:, rest] -= errors[:, place - start, None] * factor[place, rest]
    return errors


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, [K, K] float64."""
    diagonal = gram.diagonal().clone()
    damping = _DAMPING * float(diagonal.mean()) or 1.0
    damped = gram + damping * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
