"""The sampling specification, against slow and obvious versions of each rule."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from llmserve.runners.philox import uniform
from llmserve.runners.protocol import SamplingRow, StepResult
from llmserve.runners.sampler import prompt_logprobs, sample
from llmserve.sampling import SamplingParams

VOCAB = 40


def make_row(position: int = 3, **changes: object) -> SamplingRow:
    """A row whose next token is at `position`: a prompt of ones, then two twos."""
    fields = {name: changes.pop(name) for name in list(changes) if name in SamplingRow.__slots__}
    position = max(position, 3)
    values: dict[str, object] = {
        "params": SamplingParams(**changes),  # type: ignore[arg-type]
        "seed": 11,
        "choice_index": 0,
        "token_ids": [1] * (position - 2) + [2, 2],
        "num_prompt_tokens": position - 2,
    }
    return SamplingRow(**{**values, **fields})  # type: ignore[arg-type]


def random_logits(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def draw(logits: np.ndarray, row: SamplingRow) -> StepResult:
    return sample(logits.reshape(1, -1), [row])


def token_of(logits: np.ndarray, row: SamplingRow) -> int:
    result = draw(logits, row)
    assert result.is_finite is None
    return int(result.token_ids[0])


def oracle(logits: np.ndarray, row: SamplingRow) -> int:
    """The specification read aloud, one token at a time, in Python floats."""
    weights = kept_weights(logits, row)
    threshold = uniform(row.seed, row.choice_index, row.position) * sum(weights.values())
    cumulated = 0.0
    for token_id, weight in weights.items():
        cumulated += weight
        if cumulated > threshold:
            return token_id
    return max(weights)


def kept_weights(logits: np.ndarray, row: SamplingRow) -> dict[int, float]:
    """What the cuts leave, by ascending id, with its weight."""
    params = row.params
    values = [float(value) for value in logits]
    for token_id in set(row.token_ids):
        value = values[token_id]
        penalty = params.repetition_penalty
        values[token_id] = value / penalty if value > 0 else value * penalty
    for token_id, count in Counter(row.token_ids[row.num_prompt_tokens :]).items():
        values[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in params.logit_bias.items():
        values[token_id] += bias
    allowed = range(VOCAB) if params.allowed_token_ids is None else params.allowed_token_ids
    for token_id in range(VOCAB):
        if token_id not in allowed or token_id in params.banned_token_ids + row.banned_token_ids:
            values[token_id] = -math.inf
    ranked = sorted(range(VOCAB), key=lambda token_id: (-values[token_id], token_id))
    if params.is_greedy:
        return {ranked[0]: 1.0}
    ranked = [token_id for token_id in ranked if values[token_id] > -math.inf]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    weights = {i: math.exp((values[i] - values[ranked[0]]) / params.temperature) for i in ranked}
    total, share, nucleus = sum(weights.values()), 0.0, []
    for token_id in ranked:
        nucleus.append(token_id)
        share += weights[token_id]
        if share >= params.top_p * total:
            break
    kept = sorted(i for i in nucleus if weights[i] >= params.min_p * weights[ranked[0]])
    if params.typical_p < 1:
        kept = typical({i: weights[i] for i in kept}, params.typical_p)
    return {token_id: weights[token_id] for token_id in kept}


def typical(weights: dict[int, float], typical_p: float) -> list[int]:
    total = sum(weights.values())
    shares = {i: weight / total for i, weight in weights.items() if weight > 0}
    entropy = -sum(share * math.log(share) for share in shares.values())
    ranked = sorted(shares, key=lambda i: (abs(-math.log(shares[i]) - entropy), i))
    kept, share = [], 0.0
    for token_id in ranked:
        kept.append(token_id)
        share += shares[token_id]
        if share >= typical_p:
            break
    return sorted(kept)


SETTINGS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 1.5},
    {"temperature": 0.0, "banned_token_ids": (3, 5)},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 12},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "presence_penalty": 1.0},
    {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 1.3, "typical_p": 0.9, "top_k": 25, "min_p": 0.01},
    {"temperature": 1.0, "allowed_token_ids": (3, 5, 8, 13, 21), "banned_token_ids": (5,)},
    {"temperature": 0.0, "allowed_token_ids": (3, 5)},
    {"temperature": 1.0, "min_tokens": 9, "end_token_ids": (0, 4, 6)},
    {"temperature": 1.0, "logit_bias": {7: 5.0, 9: -100.0}, "repetition_penalty": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_token_is_the_one_that_the_specification_draws(settings: dict[str, object]) -> None:
    for seed in range(200):
        logits = random_logits(seed)[0]
        row = make_row(position=seed, **settings)
        assert token_of(logits, row) == oracle(logits, row)


def test_rows_do_not_see_each_other() -> None:
    logits = random_logits(5, rows=len(SETTINGS))
    rows = [make_row(position=i, **settings) for i, settings in enumerate(SETTINGS)]
    together = sample(logits, rows).token_ids.tolist()
    assert together == [token_of(logits[i], row) for i, row in enumerate(rows)]


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(1, rows=2)
    before = logits.copy()
    penalized = {"repetition_penalty": 2.0, "logit_bias": {1: 3.0}, "banned_token_ids": (0,)}
    sample(logits, [make_row(**penalized), make_row(temperature=0.0, **penalized)])
    np.testing.assert_array_equal(logits, before)


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[4, 9, 30]] = 2.0
    assert token_of(logits, make_row(temperature=0.0)) == 4
    drawn = {token_of(logits, make_row(position=i, top_k=2)) for i in range(200)}
    assert drawn == {4, 9}


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = random_logits(2)[0]
    assert token_of(logits, make_row(temperature=temperature)) == int(logits.argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_that_is_not_finite_is_marked_and_its_neighbour_is_not(bad: float) -> None:
    logits = random_logits(3, rows=2)
    logits[0, 8] = bad
    result = sample(logits, [make_row(), make_row(logprobs=0)])
    assert result.is_finite is not None
    assert result.is_finite.tolist() == [False, True]


def test_row_of_minus_infinities_is_marked() -> None:
    logits = np.full((1, VOCAB), -np.inf, dtype=np.float32)
    is_finite = sample(logits, [make_row()]).is_finite
    assert is_finite is not None
    assert not is_finite[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_whose_masks_leave_nothing_is_marked_and_no_masked_id_is_drawn(
    temperature: float,
) -> None:
    logits = random_logits(3)
    row = make_row(
        temperature=temperature, allowed_token_ids=(4,), min_tokens=9, end_token_ids=(4,)
    )
    is_finite = sample(logits, [row]).is_finite
    assert is_finite is not None
    assert not is_finite[0]


def test_prompt_logprobs_are_those_of_drawn_tokens() -> None:
    logits = random_logits(8, rows=3)
    found = prompt_logprobs(logits, [int(row.argmax()) for row in logits], 2)
    drawn = sample(logits, [make_row(temperature=0.0, logprobs=2)] * 3)
    assert found == drawn.logprobs


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4)[0]
    drawn = draw(logits, make_row(temperature=0.7, logit_bias={3: 50.0}, logprobs=4))
    assert drawn.token_ids.tolist() == [3]
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert drawn.logprobs is not None
    (entry,) = drawn.logprobs
    assert entry is not None
    assert entry.logprob == pytest.approx(exact[3], abs=1e-9)
    ranked = np.argsort(-logits, kind="stable")[:4]
    assert [token_id for token_id, _ in entry.top] == ranked.tolist()
    assert [value for _, value in entry.top] == pytest.approx(exact[ranked].tolist())


CUTS: list[dict[str, object]] = [
    {},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"typical_p": 0.7},
    {"frequency_penalty": 1.0, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_frequencies_match_the_probabilities(cut: dict[str, object]) -> None:
    """The sampler's chi-square test: 20,000 choices of one seed against what the rules say."""
    logits = random_logits(6)[0][:8]
    draws = 20_000
    rows = [make_row(choice_index=choice, **cut) for choice in range(draws)]
    counts = np.bincount(
        sample(np.repeat(logits[None], draws, axis=0), rows).token_ids, minlength=8
    )
    wide = np.full(VOCAB, -np.inf, dtype=np.float32)
    wide[:8] = logits
    weights = kept_weights(wide, make_row(**cut))
    probabilities = np.array([weights.get(i, 0.0) for i in range(8)]) / sum(weights.values())
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    wanted = draws * probabilities[kept]
    chi_square = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    assert chi_square < 24.3  # 99.9 % quantile with 7 degrees of freedom, the most there are
