"""The sampling specification, against slow and obvious versions of each rule."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from llmserve.runners.philox import uniform
from llmserve.runners.protocol import SampledToken, SamplingRow
from llmserve.runners.sampler import sample
from llmserve.sampling import SamplingParams

VOCAB = 40


def make_row(position: int = 3, **changes: object) -> SamplingRow:
    fields = {name: changes.pop(name) for name in list(changes) if name in SamplingRow.__slots__}
    values: dict[str, object] = {
        "params": SamplingParams(**changes),  # type: ignore[arg-type]
        "seed": 11,
        "choice_index": 0,
        "position": position,
        "token_ids": [1, 2, 2],
        "num_prompt_tokens": 1,
    }
    return SamplingRow(**{**values, **fields})  # type: ignore[arg-type]


def random_logits(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def draw(logits: np.ndarray, row: SamplingRow) -> SampledToken:
    return sample(logits.reshape(1, -1), [row])[0]


def oracle(logits: np.ndarray, row: SamplingRow) -> int:
    """The specification read aloud, one token at a time, in Python floats."""
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
    for token_id in row.banned_token_ids:
        values[token_id] = -math.inf
    ranked = sorted(range(VOCAB), key=lambda token_id: (-values[token_id], token_id))
    if params.is_greedy:
        return ranked[0]
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
    threshold = uniform(row.seed, row.choice_index, row.position) * sum(weights[i] for i in kept)
    cumulated = 0.0
    for token_id in kept:
        cumulated += weights[token_id]
        if cumulated > threshold:
            return token_id
    return kept[-1]


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
    {"temperature": 1.0, "logit_bias": {7: 5.0, 9: -100.0}, "repetition_penalty": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_token_is_the_one_that_the_specification_draws(settings: dict[str, object]) -> None:
    for seed in range(200):
        logits = random_logits(seed)[0]
        row = make_row(position=seed, **settings)
        assert draw(logits, row).token_id == oracle(logits, row)


def test_rows_do_not_see_each_other() -> None:
    logits = random_logits(5, rows=len(SETTINGS))
    rows = [make_row(position=i, **settings) for i, settings in enumerate(SETTINGS)]
    together = sample(logits, rows)
    assert together == [draw(logits[i], row) for i, row in enumerate(rows)]


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(1, rows=2)
    before = logits.copy()
    penalized = {"repetition_penalty": 2.0, "logit_bias": {1: 3.0}, "banned_token_ids": (0,)}
    sample(logits, [make_row(**penalized), make_row(temperature=0.0, **penalized)])
    np.testing.assert_array_equal(logits, before)


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[4, 9, 30]] = 2.0
    assert draw(logits, make_row(temperature=0.0)).token_id == 4
    drawn = {draw(logits, make_row(position=i, top_k=2)).token_id for i in range(200)}
    assert drawn == {4, 9}


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = random_logits(2)[0]
    assert draw(logits, make_row(temperature=temperature)).token_id == int(logits.argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_that_is_not_finite_is_marked_and_its_neighbour_is_not(bad: float) -> None:
    logits = random_logits(3, rows=2)
    logits[0, 8] = bad
    first, second = sample(logits, [make_row(), make_row()])
    assert not first.is_finite
    assert second.is_finite


def test_row_of_minus_infinities_is_marked() -> None:
    logits = np.full((1, VOCAB), -np.inf, dtype=np.float32)
    assert not sample(logits, [make_row()])[0].is_finite


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4)[0]
    result = draw(logits, make_row(temperature=0.7, logit_bias={3: 50.0}, logprobs=4))
    assert result.token_id == 3
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert result.logprobs is not None
    assert result.logprobs.logprob == pytest.approx(exact[3], abs=1e-9)
    ranked = np.argsort(-logits, kind="stable")[:4]
    assert [token_id for token_id, _ in result.logprobs.top] == ranked.tolist()
    assert [value for _, value in result.logprobs.top] == pytest.approx(exact[ranked].tolist())


def test_frequencies_match_the_probabilities() -> None:
    logits = random_logits(6)[0][:8]
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    draws = 20_000
    batch = np.repeat(logits[None], draws, axis=0)
    rows = [make_row(position=i, token_ids=[], num_prompt_tokens=0) for i in range(draws)]
    counts = np.bincount([token.token_id for token in sample(batch, rows)], minlength=8)
    chi_square = float(((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum())
    assert chi_square < 24.3  # 99.9 % quantile of chi-square with 7 degrees of freedom
