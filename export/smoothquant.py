"""SmoothQuant: activations hand their outliers to the weights, so that both fit int8.

Each site's inputs are divided by s = max|x| ** alpha / max|w| ** (1 - alpha), and alpha is the one
of a list with the smallest error of the layers' outputs when both are int8, activations with one
scale for each token, as a W8A8 folder asks of other programs. s = 1 is in the list. The native
runner's activations have 15 bits, which need no help.

Source: SmoothQuant, arXiv 2211.10438, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmserve.quant.dtypes import Float32Array
from llmserve.quant.groups import GridRule, quantize_to_nearest

from .calibrate import InputStatistics
from .quant_fold import FoldSite, Tensors, tie

__all__ = ["smooth_scales"]

_ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def smooth_scales(
    site: FoldSite, tensors: Tensors, statistics: InputStatistics, rules: Mapping[str, GridRule]
) -> Float32Array | None:
    """What to divide the site's inputs by, [K]; None: nothing is better than nothing.

    Arguments as in `awq_scales`.
    """
    largest = tie(site, statistics.largest.numpy())
    if not rules or statistics.num_rows == 0 or not largest.any():
        return None
    weights = {layer: tensors[f"{layer}.weight"] for layer in rules}
    columns = np.maximum.reduce([np.abs(weight).max(axis=0) for weight in weights.values()])
    columns = tie(site, columns)
    rows = statistics.sample.numpy()
    candidates = [None, *(_scales(largest, columns, alpha) for alpha in _ALPHAS)]
    errors = [
        sum(_error(rows, weights[layer], scales, rule) for layer, rule in rules.items())
        for scales in candidates
    ]
    return candidates[int(np.argmin(errors))]


def _scales(largest: Float32Array, columns: Float32Array, alpha: float) -> Float32Array:
    is_used = (largest > 0) & (columns > 0)
    scales = np.ones_like(largest)
    scales[is_used] = largest[is_used] ** alpha / columns[is_used] ** (1 - alpha)
    centred: Float32Array = (scales / np.exp(np.log(scales).mean())).astype(np.float32)
    return centred


def _error(
    rows: Float32Array, weight: Float32Array, scales: Float32Array | None, rule: GridRule
) -> float:
    exact = rows @ weight.T
    if scales is not None:
        rows, weight = rows / scales, weight * scales
    product = _rounded(rows) @ quantize_to_nearest(weight, rule).dequantize().T
    return float(np.square(product - exact, dtype=np.float64).sum())


def _rounded(rows: Float32Array) -> Float32Array:
    """Rows as int8 with one scale each gives them back."""
    steps = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    back: Float32Array = np.rint(rows / np.where(steps == 0, 1, steps)) * steps
    return back
