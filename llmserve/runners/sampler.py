"""From logits to tokens: the specification of sampling, in numpy.

Every runner gives what this module gives. For one row of float32 logits, in this order:

1. log-probabilities, where asked for: the log-softmax of the logits as they are;
2. repetition penalty on every id of the sequence, presence and frequency penalties on generated
   ids, then `logit_bias`, then banned ids to minus infinity;
3. temperature 0: the largest logit, ties to the lowest id. Otherwise logits / temperature;
4. top-k: the k largest, ties at the border to the lowest ids; top-p: of those, from the likeliest
   down, the fewest whose share reaches top_p; min-p: of those, the ones at least min_p times as
   likely as the likeliest;
5. the draw: the kept ids in ascending order, their probabilities cumulated in float64, the first
   whose cumulated share exceeds the uniform number keyed by (seed, choice, position).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt

from .philox import uniform
from .protocol import SampledToken, SamplingRow, TokenLogprobs

__all__ = ["sample"]

_LEAST_TEMPERATURE = 1e-9
"""Temperatures under it count as it: no quotient of float32 logits overflows then."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def sample(logits: Floats, rows: list[SamplingRow]) -> list[SampledToken]:
    """One token for each row of `logits` [R, V]; the logits are left as they are. O(R V)."""
    likeliest = logits.argmax(axis=1).tolist()
    tokens = []
    for raw, best, row in zip(logits, likeliest, rows, strict=True):
        # NaN wins argmax, so the largest value tells whether a row can be used at all.
        if not math.isfinite(raw[best]):
            tokens.append(SampledToken(token_id=0, is_finite=False))
            continue
        token_id = best if _is_plain(row) else _draw(raw, row)
        tokens.append(SampledToken(token_id, _logprobs(raw, token_id, row)))
    return tokens


def _is_plain(row: SamplingRow) -> bool:
    """Whether the row's token is simply that of its largest logit."""
    return row.params.is_greedy and not row.banned_token_ids and not _changes_logits(row)


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
    )


def _draw(raw: Floats, row: SamplingRow) -> int:
    logits = _processed(raw, row)
    params = row.params
    if params.is_greedy:
        return int(logits.argmax())
    kept = _top_k(logits, params.top_k)
    largest = float(logits[kept].max())
    temperature = max(params.temperature, _LEAST_TEMPERATURE)
    weights = np.exp((logits[kept].astype(np.float64) - largest) / temperature)
    if params.top_p < 1.0:
        chosen = _top_p(weights, params.top_p)
        kept, weights = kept[chosen], weights[chosen]
    if params.min_p > 0.0:
        likely = weights >= params.min_p * weights.max()
        kept, weights = kept[likely], weights[likely]
    cumulated = weights.cumsum()
    threshold = uniform(row.seed, row.choice_index, row.position) * cumulated[-1]
    place = int(np.searchsorted(cumulated, threshold, side="right"))
    return int(kept[min(place, len(kept) - 1)])  # rounding may put the threshold on the total


def _processed(raw: Floats, row: SamplingRow) -> Floats:
    """Penalties, bias and bans applied to a copy, in float32."""
    if not row.banned_token_ids and not _changes_logits(row):
        return raw
    params = row.params
    logits = raw.copy()
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(row.token_ids, dtype=np.int64))
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(row.token_ids[row.num_prompt_tokens :])
        for token_id, count in counts.items():
            logits[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    banned = list(row.banned_token_ids)
    if len(set(banned)) < len(logits):  # a row with every id banned has none to fall back on
        logits[banned] = -np.inf
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


def _logprobs(raw: Floats, token_id: int, row: SamplingRow) -> TokenLogprobs | None:
    """Log-softmax of the chosen and the likeliest ids, computed in float64."""
    count = row.params.logprobs
    if count is None:
        return None
    shifted = raw.astype(np.float64) - float(raw.max())
    log_total = float(np.log(np.exp(shifted).sum()))
    top = _likeliest(raw, count)
    return TokenLogprobs(
        logprob=float(shifted[token_id]) - log_total,
        top=tuple((int(index), float(shifted[index]) - log_total) for index in top),
    )


def _likeliest(raw: Floats, count: int) -> Ids:
    """Ids of the `count` largest logits, largest first, ties to the lowest id."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    kept = _top_k(raw, count)
    return kept[np.argsort(-raw[kept], kind="stable")][:count]
