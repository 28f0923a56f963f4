"""AWQ: inputs that are large on average get more of the grid, at the cost of the small ones.

Each site's inputs are divided by s = (mean magnitude) ** alpha, its columns multiplied by s, and
alpha is the one of a list with the smallest error of the layers' outputs after rounding. alpha 0 is
in the list: it changes nothing. Scales of groups are searched, which is the paper's clipping.

Source: AWQ, arXiv 2306.00978, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from llmserve.quant.dtypes import Float32Array
from llmserve.quant.groups import GridRule, quantize_to_nearest

from .calibrate import InputStatistics
from .gptq import output_error
from .quant_fold import FoldSite, Tensors, tie

__all__ = ["awq_scales"]

_ALPHAS = tuple(step / 12 for step in range(13))


def awq_scales(
    site: FoldSite, tensors: Tensors, statistics: InputStatistics, rules: Mapping[str, GridRule]
) -> Float32Array | None:
    """What to divide the site's inputs by, [K]; None: nothing is better than nothing.

    Args:
        site: where.
        tensors: the block's.
        statistics: the inputs of the site's layers.
        rules: layer → how it is to be rounded; those of the site that are quantized.
    """
    magnitudes = tie(site, statistics.mean_magnitude.numpy())
    if not rules or statistics.num_rows == 0 or not magnitudes.any():
        return None
    importance = statistics.importance
    best, least = None, np.inf
    for alpha in _ALPHAS:
        scales = _scales(magnitudes, alpha)
        error = sum(
            _error(tensors[f"{layer}.weight"], scales, statistics.gram, importance, rule)
            for layer, rule in rules.items()
        )
        if error < least:
            best, least = (scales if alpha else None), error
    return best


def _scales(magnitudes: Float32Array, alpha: float) -> Float32Array:
    positive = np.where(magnitudes > 0, magnitudes, magnitudes[magnitudes > 0].min())
    powers = positive.astype(np.float64) ** alpha
    scales: Float32Array = (powers / np.sqrt(powers.max() * powers.min())).astype(np.float32)
    return scales


def _error(
    weight: Float32Array, scales: Float32Array, gram: Tensor, importance: Float32Array | None,
    rule: GridRule,
) -> float:  # fmt: skip
    weights = None if importance is None else np.asarray(importance / np.square(scales), np.float32)
    rounded = quantize_to_nearest(weight * scales, rule, importance=weights).dequantize()
    return output_error(weight, rounded / scales, gram)
