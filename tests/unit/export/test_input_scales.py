"""AWQ and SmoothQuant: never worse than no scaling, by their own measure; better on outliers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.export.awq import awq_scales
from llmserve.export.calibrate import InputStatistics
from llmserve.export.gptq import output_error
from llmserve.export.quant_fold import FoldSite
from llmserve.export.smoothquant import smooth_scales
from llmserve.quant.groups import GridRule, quantize_to_nearest

SITE = FoldSite(consumers=("a", "b"), producer="norm", is_norm=True)
INT4 = GridRule(bits=4, group_size=16, is_searched=True)
INT8 = GridRule(bits=8, group_size=None)


def case(outliers: float) -> tuple[dict[str, Any], InputStatistics, torch.Tensor]:
    """Two layers and inputs of which two are larger by that factor."""
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=(24, 32)).astype(np.float32) for name in "ab"}
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    x[:, [3, 20]] *= outliers
    statistics = InputStatistics.of_width(32)
    statistics.add(x)
    return tensors, statistics, x


def error_of_int4(weight: np.ndarray, scales: np.ndarray, statistics: InputStatistics) -> float:
    assert statistics.importance is not None
    importance = (statistics.importance / scales**2).astype(np.float32)
    rounded = quantize_to_nearest(weight * scales, INT4, importance=importance).dequantize()
    return output_error(weight, rounded / scales, statistics.gram)


def test_awq_gives_large_inputs_more_of_the_grid() -> None:
    tensors, statistics, _ = case(30.0)
    scales = awq_scales(SITE, tensors, statistics, {"a": INT4, "b": INT4})
    assert scales is not None
    assert scales[[3, 20]].min() > np.delete(scales, [3, 20]).max()
    none = np.ones(32, np.float32)
    for name in ("a.weight", "b.weight"):
        scaled, plain = (error_of_int4(tensors[name], one, statistics) for one in (scales, none))
        assert scaled < 0.7 * plain


def test_smoothquant_takes_outliers_from_the_activations() -> None:
    tensors, statistics, x = case(100.0)
    scales = smooth_scales(SITE, tensors, statistics, {"a": INT8, "b": INT8})
    assert scales is not None
    ratio = (x.abs().amax(0) / torch.from_numpy(scales)).numpy()
    assert ratio.max() / np.median(ratio) < 0.3 * (x.abs().amax() / x.abs().amax(0).median()).item()


@pytest.mark.parametrize("choose", [awq_scales, smooth_scales])
def test_nothing_is_scaled_where_nothing_came_or_nothing_is_quantized(choose: Any) -> None:
    tensors, statistics, _ = case(30.0)
    nothing = InputStatistics.of_width(32)
    assert choose(SITE, tensors, nothing, {"a": INT4}) is None
    assert choose(SITE, tensors, statistics, {}) is None


@pytest.mark.parametrize("choose", [awq_scales, smooth_scales])
def test_heads_that_share_a_value_share_its_scale(choose: Any) -> None:
    site = dataclasses.replace(SITE, consumers=("a",), is_norm=False, num_repeats=2, head_dim=8)
    tensors, statistics, _ = case(50.0)
    scales = choose(site, tensors, statistics, {"a": INT8 if choose is smooth_scales else INT4})
    assert scales is not None
    heads = scales.reshape(2, 2, 8)
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])


@pytest.mark.parametrize("choose", [awq_scales, smooth_scales])
def test_scales_are_finite_where_inputs_or_columns_are_zero(choose: Any) -> None:
    tensors, _, x = case(50.0)
    x[:, 5] = 0.0
    tensors["a.weight"][:, 6] = tensors["b.weight"][:, 6] = 0.0
    statistics = InputStatistics.of_width(32)
    statistics.add(x)
    scales = choose(SITE, tensors, statistics, {"a": INT8, "b": INT8})
    assert scales is None or (np.isfinite(scales) & (scales > 0)).all()
