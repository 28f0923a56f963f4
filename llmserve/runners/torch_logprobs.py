"""Log-probabilities made where the logits are (docs/sampling.md), of which only those asked for
come back.

Shapes: R rows, V vocabulary, K the most likeliest ids that a row asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .protocol import TokenLogprobs
from .torch_token_weights import most_likely

__all__ = ["entries", "log_probabilities"]


def log_probabilities(logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    """Of float32 `logits` [R, V], computed in float64.

    Args:
        logits: As the model gave them.
        token_ids: [R] the chosen ids.
        num_top: K; more than V are V.

    Returns:
        The chosen ids' [R], the likeliest ids [R, K], best first, ties to the lowest id, and theirs
        [R, K]. Rows that are not usable are NaN.
    """
    largest = logits.amax(1, keepdim=True).double()
    shifted = logits.double() - largest
    log_total = shifted.exp().sum(1, keepdim=True).log()
    chosen = shifted.gather(1, token_ids[:, None]) - log_total
    top = token_ids.new_empty((len(logits), 0))
    if num_top:
        top = most_likely(logits, min(num_top, logits.shape[1]))
    of_top = shifted.gather(1, top) - log_total
    is_usable = largest.isfinite()
    return [
        torch.where(is_usable, chosen, torch.nan)[:, 0],
        top,
        torch.where(is_usable, of_top, torch.nan),
    ]


def entries(arrays: Iterable[npt.NDArray[Any]], num_top: list[int]) -> list[TokenLogprobs]:
    """What `log_probabilities` gave, row by row, for the `num_top` ids that each asked for.

    Ids of minus infinity are left out, and all of rows that are not usable.
    """
    chosen, top, of_top = arrays
    counts = np.minimum(np.count_nonzero(of_top > -np.inf, axis=1), num_top)
    return [
        TokenLogprobs(logprob=logprob, top=_pairs(ids[:count], values[:count]))
        for logprob, ids, values, count in zip(
            chosen.tolist(), top, of_top, counts.tolist(), strict=True
        )
    ]


def _pairs(
    ids: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
