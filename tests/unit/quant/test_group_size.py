"""Group sizes for widths that the asked size does not divide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from llmserve.errors import ConfigError
from llmserve.quant.group_size import choose_group_size, divisors_around, squared_error
from llmserve.quant.groups import quantize_rtn


def normal(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, width)).astype(np.float32)


def uneven() -> np.ndarray:
    """172 wide, in runs of 4 that differ in size by up to a thousand: large groups lose most."""
    sizes = np.repeat(10.0 ** np.linspace(0, 3, 43), 4)
    return (normal(172) * np.random.default_rng(1).permutation(sizes)).astype(np.float32)


def choose(weight: np.ndarray, asked: int, *, scale_dtype: str = "float32") -> int:
    return choose_group_size(
        weight.shape[1], asked, lambda: iter([weight]), 4, scale_dtype=scale_dtype
    )


@pytest.mark.parametrize(
    ("width", "asked", "expected"),
    [
        (172, 32, (4, 43)),
        (48, 32, (24, 48)),
        (288, 32, (32, 32)),
        (105, 8, (7, 15)),
        (173, 32, (1, 173)),
        (64, 128, (64, 64)),
    ],
)
def test_divisors_around(width: int, asked: int, expected: tuple[int, int]) -> None:
    assert divisors_around(width, asked) == expected


def test_size_that_divides_is_taken_without_looking_at_weights() -> None:
    def none_needed() -> Iterator[np.ndarray]:
        raise AssertionError("the weights were asked for")

    assert choose_group_size(288, 32, none_needed, 4) == 32


def test_coarser_neighbour_is_taken_where_it_costs_little() -> None:
    assert choose(normal(172), 32, scale_dtype="bfloat16") == 43


def test_finer_neighbour_is_taken_where_the_coarser_loses_much() -> None:
    weight = uneven()
    asked = squared_error(weight, 4, 8, scale_dtype="bfloat16")
    assert squared_error(weight, 4, 43, scale_dtype="bfloat16") > 1.25 * asked
    assert choose(weight, 8, scale_dtype="bfloat16") == 4


def test_finer_neighbour_is_not_taken_where_scales_would_outweigh_the_integers() -> None:
    assert choose(uneven(), 8, scale_dtype="float32") == 43  # 32 bits of scale for 4 weights
    assert choose(normal(173), 32) == 173


def test_error_of_short_last_group_counts() -> None:
    weight = normal(10)
    parts = [np.ascontiguousarray(weight[:, :8]), np.ascontiguousarray(weight[:, 8:])]
    expected = sum(
        float(np.square(part - quantize_rtn(part, 4, size).dequantize(), dtype=np.float64).sum())
        for part, size in zip(parts, (4, 2), strict=True)
    )
    assert squared_error(weight, 4, 4) == pytest.approx(expected, rel=1e-12)


def test_group_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 weight, not 0"):
        divisors_around(8, 0)
