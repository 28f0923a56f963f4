"""The counter-based random numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmserve.runners.philox import philox4x32, random_number, random_numbers

SPECIFICATION = Path(__file__).parents[3] / "docs" / "sampling.md"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_generators_authors(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == words


@pytest.mark.parametrize(
    ("line", "seed", "choice_index", "position"),
    [
        ("0 | 0 | 0", 0, 0, 0),
        ("1234567890123 | 2 | 77", 1234567890123, 2, 77),
        ("2^63 - 1 | 15 | 2^33 + 5", 2**63 - 1, 15, 2**33 + 5),
    ],
)
def test_layout_is_that_of_the_specification(
    line: str, seed: int, choice_index: int, position: int
) -> None:
    """The documented words come from the documented key and counter, and the number from them."""
    pattern = re.escape(f"| {line} |") + r" `([0-9a-f ]+)` \| (\d+) \|"
    match = re.search(pattern, SPECIFICATION.read_text(encoding="utf-8"))
    assert match is not None
    high, low = position >> 32, position & 0xFFFFFFFF
    words = philox4x32((low, high, choice_index, 0), (seed & 0xFFFFFFFF, seed >> 32))
    assert " ".join(f"{word:08x}" for word in words) == match[1]
    number = random_number(seed, choice_index, position)
    assert number == words[0] * 2**21 + words[1] // 2**11 == int(match[2])


def test_every_part_of_seed_choice_and_position_counts() -> None:
    draws = {
        random_number(seed, choice, position)
        for seed in (0, 1, 2**62 + 1)
        for choice in (0, 1)
        for position in (0, 1, 2**33)
    }
    assert len(draws) == 18
    assert all(0 <= draw < 2**53 for draw in draws)


# Where t runs along one axis, with the others held.
AXES: dict[str, Callable[[int], int]] = {
    "position": lambda t: random_number(7, 0, t),
    "seed": lambda t: random_number(t, 0, 7),
    "choice": lambda t: random_number(7, t, 3),
    "seed and position": lambda t: random_number(t, 0, t),
}


@pytest.mark.parametrize("axis", AXES)
def test_numbers_fill_their_range_evenly(axis: str) -> None:
    draws = np.array([AXES[axis](t) for t in range(10_000)]) / 2**53
    counts = np.bincount((draws * 10).astype(int), minlength=10)
    chi_square = float(((counts - 1_000) ** 2 / 1_000).sum())
    assert chi_square < 27.9  # 99.9 % quantile of chi-square with 9 degrees of freedom


# Two numbers that a use of the generator may bring side by side.
PAIRS: dict[str, Callable[[int], tuple[int, int]]] = {
    "next position": lambda t: (random_number(7, 0, 2 * t), random_number(7, 0, 2 * t + 1)),
    "next choice": lambda t: (random_number(7, 0, t), random_number(7, 1, t)),
    "next seed": lambda t: (random_number(2 * t, 0, 5), random_number(2 * t + 1, 0, 5)),
    "seed and position swapped": lambda t: (random_number(t, 0, 6400), random_number(6400, 0, t)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_neighbours_are_independent(pair: str) -> None:
    """All 64 combinations of their eighths come as often as each other."""
    cells = [PAIRS[pair](t) for t in range(6_400)]
    counts = np.bincount([8 * (a >> 50) + (b >> 50) for a, b in cells], minlength=64)
    chi_square = float(((counts - 100) ** 2 / 100).sum())
    assert chi_square < 103.4  # 99.9 % quantile of chi-square with 63 degrees of freedom


def test_many_numbers_at_once_are_those_of_one_at_a_time() -> None:
    rng = np.random.default_rng(3)
    seeds = [0, 2**63 - 1, *rng.integers(0, 2**63, 20).tolist()]
    choices = [0, 15, *rng.integers(0, 2**31, 20).tolist()]
    positions = [0, 2**33 + 5, *rng.integers(0, 2**40, 20).tolist()]
    wanted = [random_number(*row) for row in zip(seeds, choices, positions, strict=True)]
    assert random_numbers(seeds, choices, positions).tolist() == wanted
