"""From logits to tokens: the specification of docs/sampling.md, in numpy.

Every runner gives what this module gives. For one row of float32 logits: log-probabilities of the
logits as they are; penalties, bias, masks; then the largest, or temperature, top-k, top-p, min-p,
typical and one draw with the uniform number keyed by (seed, choice, position).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .philox import uniform
from .protocol import SamplingRow, StepResult, TokenLogprobs

__all__ = ["prompt_logprobs", "sample"]

_LEAST_TEMPERATURE = 1e-9
"""Temperatures under it count as it: no quotient of float32 logits overflows then."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_NO_IDS: Ids = np.empty(0, dtype=np.int64)


def sample(logits: Floats, rows: list[SamplingRow]) -> StepResult:
    """One token for each row of `logits` [R, V]; the logits are left as they are. O(R V)."""
    token_ids = logits.argmax(axis=1).astype(np.int64)
    # NaN wins argmax, so the largest value tells whether a row can be used at all.
    is_finite = np.isfinite(logits[np.arange(len(rows)), token_ids])
    wants_logprobs = False
    for index, row in enumerate(rows):
        wants_logprobs |= row.params.logprobs is not None
        if is_finite[index] and not _is_plain(row):
            token_id = _draw(logits[index], row)
            is_finite[index] = token_id is not None
            token_ids[index] = token_id or 0
    logprobs: list[TokenLogprobs | None] | None = None
    if wants_logprobs:
        logprobs = [
            _logprobs(logits[index], int(token_ids[index]), row.params.logprobs)
            if row.params.logprobs is not None and is_finite[index]
            else None
            for index, row in enumerate(rows)
        ]
    return StepResult(
        token_ids=token_ids, is_finite=None if is_finite.all() else is_finite, logprobs=logprobs
    )


def prompt_logprobs(logits: Floats, targets: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability of `targets[i]` after row i of `logits` [n, V], and the likeliest ids."""
    return [_logprobs(raw, target, num_top) for raw, target in zip(logits, targets, strict=True)]


def _is_plain(row: SamplingRow) -> bool:
    """Whether the row's token is simply that of its largest logit."""
    return row.params.is_greedy and not _changes_logits(row)


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.allowed_token_ids is not None
        or params.banned_token_ids
        or row.banned_token_ids
    )


def _draw(raw: Floats, row: SamplingRow) -> int | None:
    """The row's token; None where the masks leave none."""
    logits = _processed(raw, row)
    params = row.params
    if params.is_greedy:
        best = int(logits.argmax())
        return best if logits[best] > -np.inf else None
    kept = _top_k(logits, params.top_k)
    if not len(kept):
        return None
    largest = float(logits[kept].max())
    temperature = max(params.temperature, _LEAST_TEMPERATURE)
    weights = np.exp((logits[kept].astype(np.float64) - largest) / temperature)
    if params.top_p < 1.0:
        chosen = _top_p(weights, params.top_p)
        kept, weights = kept[chosen], weights[chosen]
    if params.min_p > 0.0:
        likely = weights >= params.min_p * weights.max()
        kept, weights = kept[likely], weights[likely]
    if params.typical_p < 1.0:
        chosen = _typical(weights, params.typical_p)
        kept, weights = kept[chosen], weights[chosen]
    cumulated = weights.cumsum()
    threshold = uniform(row.seed, row.choice_index, row.position) * cumulated[-1]
    place = int(np.searchsorted(cumulated, threshold, side="right"))
    return int(kept[min(place, len(kept) - 1)])  # rounding may put the threshold on the total


def _processed(raw: Floats, row: SamplingRow) -> Floats:
    """Penalties, bias and masks applied to a copy, in float32."""
    if not _changes_logits(row):
        return raw
    params = row.params
    logits = raw.copy()
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(row.token_ids, dtype=np.int64))
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        generated = np.asarray(row.token_ids[row.num_prompt_tokens :], dtype=np.int64)
        seen, counts = np.unique(generated, return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        logits[seen] -= penalties.astype(np.float32)
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += np.float32(bias)
    if params.allowed_token_ids is not None:
        allowed = np.asarray(params.allowed_token_ids, dtype=np.int64)
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        logits = masked
    logits[[*params.banned_token_ids, *row.banned_token_ids]] = -np.inf
    return logits


def _top_k(logits: Floats, top_k: int) -> Ids:
    """Ascending ids of the k largest logits, ties at the border to the lowest ids."""
    size = len(logits)
    if top_k <= 0 or top_k >= size:
        return np.flatnonzero(logits > -np.inf)
    border = np.partition(logits, size - top_k)[size - top_k]
    above = np.flatnonzero(logits > border)
    ties = np.flatnonzero(logits == border)[: top_k - len(above)]
    kept = np.union1d(above, ties)
    return kept[logits[kept] > -np.inf]


def _top_p(weights: Doubles, top_p: float) -> Ids:
    """Ascending places of the fewest, likeliest weights whose share reaches `top_p`."""
    total = weights.sum()
    # What lies under this bound adds up to less than 1 - top_p, so it is never needed: sorting the
    # rest is cheap for peaked distributions.
    candidates = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    shares = weights[order].cumsum()
    count = int(np.searchsorted(shares, top_p * total, side="left")) + 1
    return np.sort(order[:count])


def _typical(weights: Doubles, typical_p: float) -> Ids:
    """Ascending places of the fewest weights, nearest to the entropy first, that reach the share.

    Distance of a token: | -log p - H |, H the entropy of the kept tokens (Meister et al. 2022,
    arXiv:2202.00666, section 4); ties go to the lower place.
    """
    shares = weights / weights.sum()
    with np.errstate(divide="ignore"):
        surprise = -np.log(shares)
    entropy = (shares * np.where(shares > 0, surprise, 0.0)).sum()
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    count = int(np.searchsorted(shares[order].cumsum(), typical_p, side="left")) + 1
    return np.sort(order[:count])


def _logprobs(raw: Floats, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-softmax of the chosen and the likeliest ids, computed in float64."""
    shifted = raw.astype(np.float64) - float(raw.max())
    log_total = float(np.log(np.exp(shifted).sum()))
    top = _likeliest(raw, num_top)
    return TokenLogprobs(
        logprob=float(shifted[token_id]) - log_total,
        top=tuple((int(index), float(shifted[index]) - log_total) for index in top),
    )


def _likeliest(raw: Floats, count: int) -> Ids:
    """Ids of the `count` largest logits, largest first, ties to the lowest id."""
    if count == 0:
        return _NO_IDS
    kept = _top_k(raw, count)
    return kept[np.argsort(-raw[kept], kind="stable")][:count]
