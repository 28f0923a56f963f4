"""The counter-based random numbers."""

from __future__ import annotations

import pytest

from llmserve.runners.philox import philox4x32, uniform


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


def test_uniform_depends_on_seed_choice_and_position() -> None:
    draws = {
        uniform(seed, choice, position)
        for seed in (0, 1, 2**62 + 1)
        for choice in (0, 1)
        for position in (0, 1, 2**33)
    }
    assert len(draws) == 18
    assert all(0.0 <= draw < 1.0 for draw in draws)


def test_uniform_fills_the_interval_evenly() -> None:
    draws = [uniform(7, 0, position) for position in range(10_000)]
    counts = [sum(low / 10 <= draw < (low + 1) / 10 for draw in draws) for low in range(10)]
    chi_square = sum((count - 1_000) ** 2 / 1_000 for count in counts)
    assert chi_square < 27.9  # 99.9 % quantile of chi-square with 9 degrees of freedom
