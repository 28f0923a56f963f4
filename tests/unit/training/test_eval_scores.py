"""Scores against counting by hand, and intervals against the source that samples come from."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.training.eval_scores import (
    accuracy,
    bootstrap,
    confusion,
    exact_match,
    f1_scores,
    macro_f1,
    normalized_answer,
    token_f1,
)


def f1_by_hand(wanted: list[str], found: list[str], label: str) -> float:
    right = sum(w == f == label for w, f in zip(wanted, found, strict=True))
    precision = right / max(1, found.count(label))
    recall = right / max(1, wanted.count(label))
    return 2 * precision * recall / (precision + recall) if right else 0.0


def test_label_scores_are_those_counted_by_hand() -> None:
    random, labels = np.random.default_rng(0), ["a", "b", "c"]
    wanted = random.choice(labels, 200, p=[0.6, 0.3, 0.1]).tolist()
    found = random.choice(labels, 200, p=[0.5, 0.4, 0.1]).tolist()
    sums = confusion(wanted, found, labels).sum(axis=0)
    expected = [f1_by_hand(wanted, found, label) for label in labels]
    assert accuracy(sums) == np.mean([w == f for w, f in zip(wanted, found, strict=True)])
    assert f1_scores(sums).tolist() == pytest.approx(expected)
    assert macro_f1(sums) == pytest.approx(np.mean(expected))


def test_labels_that_occur_nowhere_do_not_count() -> None:
    sums = confusion(["a", "b"], ["a", "a"], ["a", "b", "c"]).sum(axis=0)
    assert f1_scores(sums)[1] == 0.0
    assert np.isnan(f1_scores(sums)[2])
    assert macro_f1(sums) == pytest.approx((2 / 3 + 0) / 2)


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized_answer("  The  Cat, a hat!") == "cat hat"
    assert exact_match("the Park.", ["a dog", "park"]) == 1.0
    assert exact_match("parks", ["park"]) == 0.0
    assert token_f1("in the big park", ["the park", "dog"]) == pytest.approx(2 * 1 / (3 + 1))
    assert token_f1("", ["the"]) == 1.0  # both are nothing once normalized
    assert token_f1("", ["dog"]) == 0.0


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        sizes = random.integers(20, 60, size=80)
        # Each document has a mean of its own: its tokens are not independent.
        losses = sizes * random.normal(2.0, 0.5, size=80)
        parts = np.stack([losses, sizes.astype(float)], axis=1)
        interval = bootstrap(parts, lambda sums: float(sums[0] / sums[1]), seed=seed)
        assert interval.low < interval.value < interval.high
        covered += interval.low <= 2.0 <= interval.high
    assert 88 <= covered <= 99
