"""Probabilities as whole numbers: against exact powers, and the cuts at their borders."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from llmserve.runners import token_weights as module
from llmserve.runners.token_weights import (
    MAX_VOCAB_SIZE,
    by_mass,
    by_ratio,
    by_typicality,
    pick,
    steps_below,
    weights_at,
)
from support.sampling_oracle import power, weight_at

SPECIFICATION = Path(__file__).parents[3] / "docs" / "sampling.md"
ONE = 2**42


def whole(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def kept(weights: np.ndarray) -> list[int]:
    return np.flatnonzero(weights).tolist()


def numbers_after(name: str) -> list[float]:
    """The cells of the specification's table row that begins with `name`."""
    match = re.search(rf"^\| {name} \| (.*) \|$", SPECIFICATION.read_text("utf-8"), re.MULTILINE)
    assert match is not None
    return [float(cell) for cell in match[1].split(" | ")]


def test_documented_weights() -> None:
    assert weights_at(np.array(numbers_after("x"))).tolist() == numbers_after("w")


def test_documented_powers() -> None:
    found = re.findall(r"`P\[(\d+)\]` = `(0x[^`]+)`", SPECIFICATION.read_text("utf-8"))
    assert len(found) == 3
    for n, text in found:
        assert power(int(n)) == float.fromhex(text)


def test_every_power_is_the_nearest_float() -> None:
    powers = module.POWERS
    assert [power(n) for n in range(512)] == powers[:512].tolist()
    np.testing.assert_array_equal(powers[512:], powers[:-512] / 2)


def test_weights_are_those_of_the_oracle() -> None:
    steps = np.random.default_rng(0).uniform(0, 22016, 5_000)  # two blocks
    assert weights_at(steps).tolist() == [weight_at(x) for x in steps.tolist()]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_weights_are_exponentials_rounded(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(0, 4, 5_000).astype(np.float32)
    largest = float(logits.max())
    weights = weights_at(steps_below(logits, largest, temperature))
    # exp of a float64 is off by less than 1e-15 of at most 2**42: far under the 0.1 beyond rounding
    exact = [math.exp((value - largest) / temperature) * ONE for value in logits.tolist()]
    assert np.abs(weights - np.array(exact)).max() < 0.6


def test_weights_do_not_depend_on_what_stands_beside_them() -> None:
    steps = np.random.default_rng(2).uniform(0, 22016, 1_003)
    alone = [int(weights_at(steps[i : i + 1])[0]) for i in range(len(steps))]
    assert weights_at(steps).tolist() == alone


def test_total_of_the_largest_vocabulary_fits() -> None:
    assert MAX_VOCAB_SIZE * ONE < 2**63


@pytest.mark.parametrize(("top_p", "count"), [(0.1 * i, i) for i in range(1, 10)])
def test_tenths_of_ten_equal_tokens_are_reached_exactly(top_p: float, count: int) -> None:
    ten = whole(*[ONE] * 10)
    assert kept(by_mass(ten, top_p)) == list(range(count))
    assert kept(by_typicality(ten, np.zeros(10), top_p)) == list(range(count))
    assert kept(by_mass(ten, top_p + 1e-9)) == list(range(count + 1))


def test_smallest_share_keeps_one_token() -> None:
    weights = whole(ONE // 4, ONE, ONE, 5)
    assert kept(by_mass(weights, 1e-300)) == [1]
    assert kept(by_mass(whole(ONE, ONE), 1e-300)) == [0]
    assert kept(by_typicality(weights, np.array([1024.0, 0.0, 0.0, 20000.0]), 1e-300)) == [1]


def test_share_between_two_whole_numbers_takes_the_larger() -> None:
    assert kept(by_mass(whole(1, 1, 1), 0.5)) == [0, 1]


def test_mass_counts_from_the_heaviest_down_with_ties_to_the_lowest() -> None:
    weights = whole(ONE // 4, ONE // 2, ONE // 4, ONE, ONE // 4)
    shares = [(0.4, [3]), (0.6, [1, 3]), (0.7, [0, 1, 3]), (0.8, [0, 1, 2, 3])]
    assert [(p, kept(by_mass(weights, p))) for p, _ in shares] == shares


def test_ratio_compares_with_the_likeliest() -> None:
    weights = whole(ONE, ONE // 2, ONE // 10 + 1, 1, 0)
    assert kept(by_ratio(weights, 0.5)) == [0, 1]
    assert kept(by_ratio(weights, 0.1)) == [0, 1, 2]
    assert kept(by_ratio(weights, 1e-300)) == [0, 1, 2, 3]
    assert kept(by_ratio(weights, 1.0)) == [0]


def test_typical_may_leave_out_the_likeliest() -> None:
    """One token of a third, eight of a twelfth: 1.33 bits more surprising than it on average."""
    steps = np.array([0.0] + [2 * 512.0] * 8)
    weights = weights_at(steps)
    assert kept(by_typicality(weights, steps, 0.5)) == [1, 2, 3, 4, 5, 6]
    assert kept(by_typicality(weights, steps, 0.7)) == list(range(9))


def test_pick_gives_each_weight_its_part_and_nothing_to_zeros() -> None:
    weights = whole(0, 3, 0, 1, 0)
    eighths = [i * 2**50 for i in range(8)]
    assert [pick(weights, number) for number in eighths] == [1] * 6 + [3] * 2
    assert pick(weights, 3 * 2**51 - 1) == 1
    assert pick(weights, 2**53 - 1) == 3
