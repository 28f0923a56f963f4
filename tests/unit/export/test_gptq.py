"""GPTQ against its definition: round one input, make the error good by solving for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmserve.errors import ExportError
from llmserve.export.gptq import output_error, quantize_gptq
from llmserve.quant.groups import GridRule, quantize_to_nearest, weight_grid

RULE = GridRule(bits=4, group_size=8, is_searched=True)


def correlated(width: int, rows: int = 300) -> torch.Tensor:
    """Inputs that depend on each other, of different sizes."""
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing


def weights(out: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((out, width)).astype(np.float32)


def by_definition(weight: np.ndarray, gram: np.ndarray, rule: GridRule) -> np.ndarray:
    """Each input in turn, the least-squares answer of those left for its error."""
    importance = gram.diagonal().astype(np.float32)
    grid = weight_grid(weight, rule, importance=importance)
    damped = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    left = weight.astype(np.float64)
    values = np.zeros(weight.shape, np.int8)
    order = np.argsort(-gram.diagonal(), kind="stable")
    assert rule.group_size is not None
    for place, column in enumerate(order):
        group, rest = column // rule.group_size, order[place + 1 :]
        values[:, column] = grid.round(left[:, column], group)
        error = left[:, column] - grid.values(values[:, column], group)
        if len(rest):
            answer = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, column])
            left[:, rest] += np.outer(error, answer)
    return values


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_integers_are_those_of_the_definition(is_symmetric: bool) -> None:
    rule = GridRule(bits=4, group_size=8, is_searched=True, is_symmetric=is_symmetric)
    weight, x = weights(5, 24), correlated(24)
    gram = x.T @ x
    found = quantize_gptq(weight, gram, rule)
    wanted = by_definition(weight, gram.double().numpy(), rule)
    assert (found.values == wanted).mean() > 0.99, "but for ties of float sums"


@pytest.mark.parametrize("width", [8, 48, 136, 264])
def test_output_errs_less_than_after_rounding_to_nearest(width: int) -> None:
    """Beyond 128 inputs errors are spread in blocks."""
    weight, x = weights(16, width), correlated(width)
    gram = x.T @ x
    nearest = quantize_to_nearest(weight, RULE, importance=gram.diagonal().numpy())
    spread = quantize_gptq(weight, gram, RULE)
    errors = [output_error(weight, one.dequantize(), gram) for one in (spread, nearest)]
    assert errors[0] < 0.9 * errors[1]


def test_output_error_is_that_of_the_products() -> None:
    weight, x = weights(4, 16), correlated(16)
    rounded = quantize_to_nearest(weight, RULE).dequantize()
    exact = float(((x @ torch.from_numpy(rounded - weight).T).double() ** 2).sum())
    assert output_error(weight, rounded, x.T @ x) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("zeros", [[3], range(24)])
def test_inputs_that_were_always_zero_are_rounded_to_nearest(zeros: Any) -> None:
    weight, x = weights(5, 24), correlated(24)
    x[:, list(zeros)] = 0.0
    gram = x.T @ x
    importance = gram.diagonal().numpy() if gram.any() else None
    found = quantize_gptq(weight, gram, RULE)
    nearest = quantize_to_nearest(weight, RULE, importance=importance)
    np.testing.assert_array_equal(found.values[:, list(zeros)], nearest.values[:, list(zeros)])


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_layer_of_zeros_and_one_with_an_outlier_keep_their_bound(value: float) -> None:
    weight = np.zeros((4, 16), np.float32)
    weight[1, 5] = value
    x = correlated(16)
    found = quantize_gptq(weight, x.T @ x, RULE).dequantize()
    np.testing.assert_allclose(found, weight, rtol=1e-3)


def test_weight_that_is_not_finite_is_refused_by_name() -> None:
    weight = weights(4, 16)
    weight[0, 0] = np.nan
    with pytest.raises(ExportError, match="up_proj holds NaN"):
        quantize_gptq(weight, torch.eye(16), RULE, name="up_proj")
