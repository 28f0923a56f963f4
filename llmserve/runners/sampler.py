"""From logits to tokens: the specification of docs/sampling.md, in numpy.

Every runner gives what this module gives. For one row of float32 logits: log-probabilities of the
logits as they are; penalties, bias, masks; then the largest, or temperature, top-k, top-p, min-p,
typical and one draw with the random number keyed by (seed, choice, position).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .philox import random_number
from .protocol import BoolArray, MaskArray, SamplingRow, StepResult, TokenLogprobs
from .token_weights import (
    MAX_VOCAB_SIZE,
    by_mass,
    by_ratio,
    by_typicality,
    pick,
    steps_below,
    weights_at,
)

__all__ = ["likeliest", "prompt_logprobs", "sample", "unpack_mask"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def sample(logits: Floats, rows: list[SamplingRow]) -> StepResult:
    """One token for each row of `logits` [R, V]; the logits are left as they are. O(R V)."""
    assert logits.shape[1] <= MAX_VOCAB_SIZE
    token_ids, is_finite = likeliest(logits)
    token_ids[~is_finite] = 0
    wants_logprobs = False
    for index, row in enumerate(rows):
        wants_logprobs |= row.params.logprobs is not None
        if is_finite[index] and not (row.params.is_greedy and not _changes_logits(row)):
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


def likeliest(logits: Floats) -> tuple[Ids, BoolArray]:
    """Id [R] of the largest of each row of `logits` [R, V], and whether the row can be used."""
    token_ids = logits.argmax(axis=1).astype(np.int64, copy=False)
    # NaN wins argmax, so the largest value tells.
    return token_ids, np.isfinite(logits[np.arange(len(token_ids)), token_ids])


def prompt_logprobs(logits: Floats, targets: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability of `targets[i]` after row i of `logits` [n, V], and the likeliest ids.

    A row that holds NaN, plus infinity or nothing but minus infinity gives NaN and no ids.
    """
    return [_logprobs(raw, target, num_top) for raw, target in zip(logits, targets, strict=True)]


def unpack_mask(mask: MaskArray, vocab_size: int) -> BoolArray:
    """[V] which ids a packed mask allows."""
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.allowed_token_ids is not None
        or params.banned_token_ids
        or row.allowed_mask is not None
        or (params.min_tokens and row.banned_token_ids)
    )


def _draw(raw: Floats, row: SamplingRow) -> int | None:
    """The row's token; None where penalties and masks leave no finite largest logit."""
    logits = _mask(_penalize(raw, row), row) if _changes_logits(row) else raw
    likeliest = int(logits.argmax())
    largest = float(logits[likeliest])
    if not math.isfinite(largest):
        return None
    return likeliest if row.params.is_greedy else _draw_by_chance(logits, largest, row)


def _draw_by_chance(logits: Floats, largest: float, row: SamplingRow) -> int:
    params = row.params
    ids = None  # all
    if 0 < params.top_k < len(logits):
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    steps = steps_below(logits, largest, params.temperature)
    weights = weights_at(steps)
    if params.top_p < 1.0:
        weights = by_mass(weights, params.top_p)
    if params.min_p > 0.0:
        weights = by_ratio(weights, params.min_p)
    if params.typical_p < 1.0:
        weights = by_typicality(weights, steps, params.typical_p)
    place = pick(weights, random_number(row.seed, row.choice_index, row.position))
    return place if ids is None else int(ids[place])


def _penalize(raw: Floats, row: SamplingRow) -> Floats:
    """A copy with penalties and bias, each computed in float64 and rounded to float32."""
    params = row.params
    logits = raw.copy()
    with np.errstate(over="ignore"):
        if params.repetition_penalty != 1.0:
            seen = np.unique_counts(np.array(row.token_ids, dtype=np.int64)).values
            values = logits[seen].astype(np.float64)
            penalty = params.repetition_penalty
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            generated = np.array(row.token_ids[row.num_prompt_tokens :], dtype=np.int64)
            seen, counts = np.unique_counts(generated)
            penalties = params.presence_penalty + params.frequency_penalty * counts
            logits[seen] = logits[seen] - penalties
        if params.logit_bias:
            ids = list(params.logit_bias)
            logits[ids] = logits[ids] + np.array(list(params.logit_bias.values()), dtype=np.float64)
    return logits


def _mask(logits: Floats, row: SamplingRow) -> Floats:
    """Minus infinity at ids that are banned, or not among the allowed."""
    params = row.params
    if row.allowed_mask is not None:
        logits[~unpack_mask(row.allowed_mask, len(logits))] = -np.inf
    if params.allowed_token_ids is not None:
        allowed = np.array(params.allowed_token_ids, dtype=np.int64)
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        logits = masked
    logits[[*params.banned_token_ids, *row.banned_token_ids]] = -np.inf
    return logits


def _largest(logits: Floats, count: int) -> Ids:
    """Ascending ids of the `count` largest of more logits, ties at the border to the lowest."""
    size = len(logits)
    border = np.partition(logits, size - count)[size - count]
    is_kept = logits > border
    ties = np.flatnonzero(logits == border)
    is_kept[ties[: count - np.count_nonzero(is_kept)]] = True
    return np.flatnonzero(is_kept)


def _logprobs(raw: Floats, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-softmax of the chosen and the likeliest ids, computed in float64."""
    largest = float(raw.max())
    if not math.isfinite(largest):
        return TokenLogprobs(logprob=math.nan, top=())
    shifted = raw.astype(np.float64) - largest
    log_total = float(np.log(np.exp(shifted).sum()))
    top = _likeliest(raw, num_top)
    return TokenLogprobs(
        logprob=float(shifted[token_id]) - log_total,
        top=tuple((int(index), float(shifted[index]) - log_total) for index in top),
    )


def _likeliest(raw: Floats, count: int) -> Ids:
    """Ids of the `count` largest finite logits, largest first, ties to the lowest id."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    ids = _largest(raw, count) if count < len(raw) else np.arange(len(raw))
    ids = ids[raw[ids] > -np.inf]
    return ids[np.argsort(-raw[ids], kind="stable")][:count]
