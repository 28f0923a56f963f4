"""Weights and cuts in torch against the numpy version, to the bit, and wide products against
Python's whole numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from llmserve.runners import token_weights as numpys
from llmserve.runners import torch_token_weights as torchs

POWERS = torchs.powers_on(torch.device("cpu"))
CASES = {
    "spread": lambda rng: rng.normal(0, 4, 1_003),
    "ties": lambda rng: np.round(rng.normal(0, 2, 700) * 2) / 2,
    "flat": lambda rng: np.zeros(257),
    "one": lambda rng: np.array([3.5]),
    "masked": lambda rng: np.where(rng.random(300) < 0.9, -np.inf, rng.normal(0, 3, 300)),
}
SHARES = [1e-12, 0.1, 0.25, 0.5, 0.9, 0.999999, 1 - 2**-53]


def logits_of(name: str) -> np.ndarray:
    logits = CASES[name](np.random.default_rng(len(name))).astype(np.float32)
    logits[len(logits) // 2] = 4.0  # finite, whatever was masked
    return logits


def column(values: list[int]) -> Tensor:
    return torch.tensor(values)[:, None]


def weighed(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    steps = numpys.steps_below(logits, float(logits.max()), temperature)
    return steps, numpys.weights_at(steps)


@pytest.mark.parametrize("temperature", [1e-12, 0.3, 1.0, 90.0])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_numpys(name: str, temperature: float) -> None:
    logits = logits_of(name)
    wanted_steps, wanted = weighed(logits, temperature)
    raw = torch.from_numpy(logits)[None]
    scale = torch.tensor([[numpys.steps_per_unit(temperature)]], dtype=torch.float64)
    steps = torchs.steps_below(raw, raw.amax(1, keepdim=True), scale)
    np.testing.assert_array_equal(steps[0].numpy(), wanted_steps)
    assert torchs.weights_at(steps, POWERS)[0].tolist() == wanted.tolist()


@pytest.mark.parametrize("name", CASES)
def test_cuts_are_numpys(name: str) -> None:
    """Every share in a row of its own."""
    logits = logits_of(name)
    steps, weights = weighed(logits, 1.0)
    shares = column([numpys.whole_share(share) for share in SHARES])
    each = torch.from_numpy(weights).expand(len(SHARES), -1)
    by_mass = [numpys.by_mass(weights, share).tolist() for share in SHARES]
    assert torchs.by_mass(each, shares).tolist() == by_mass
    typical = [numpys.by_typicality(weights, steps, share).tolist() for share in SHARES]
    all_steps = torch.from_numpy(steps).expand(len(SHARES), -1)
    assert torchs.by_typicality(each, all_steps, shares).tolist() == typical
    ratios = [numpys.by_ratio(weights, share).tolist() for share in SHARES]
    least = column([numpys.part(share, 1 << 42) for share in SHARES])
    assert torchs.by_ratio(each, least).tolist() == ratios


@pytest.mark.parametrize("name", CASES)
def test_ranks_go_by_logit_then_by_lowest_id(name: str) -> None:
    logits = logits_of(name)
    logits[::7] = -0.0
    order = np.argsort(-logits, kind="stable")
    counts = sorted({1, 2, len(logits) // 3 + 1, len(logits)} & set(range(1, len(logits) + 1)))
    raw = torch.from_numpy(logits).expand(len(counts), -1)
    kept = torchs.by_rank(torch.ones_like(raw).long(), raw, column(counts), most=counts[-1])
    for row, count in zip(kept.numpy(), counts, strict=True):
        assert np.flatnonzero(row).tolist() == sorted(order[:count].tolist())
    assert torchs.most_likely(raw[:1], len(logits))[0].tolist() == order.tolist()


def test_pick_lands_where_numpys_does() -> None:
    rng = random.Random(0)
    weights = logits_of("spread")
    weights = weighed(weights, 2.0)[1]
    numbers = [0, 2**53 - 1, *(rng.getrandbits(53) for _ in range(200))]
    each = torch.from_numpy(weights).expand(len(numbers), -1)
    found = torchs.pick(each, column(numbers)).tolist()
    assert found == [numpys.pick(weights, number) for number in numbers]


def test_a_row_without_a_weight_is_picked_beyond_its_end() -> None:
    assert torchs.pick(torch.zeros(1, 5, dtype=torch.int64), column([123])).tolist() == [5]


def test_shares_of_totals_are_exact() -> None:
    rng = random.Random(1)
    shares = [1, 2**32, 2**32 - 1, *(rng.getrandbits(32) for _ in range(300))]
    totals = [2**63 - 1, 2**62 + 1, 2**42, *(rng.getrandbits(rng.randint(1, 63)) for _ in shares)]
    totals = totals[: len(shares)]
    wanted = [max(1, -(-s * t >> 32)) for s, t in zip(shares, totals, strict=True)]
    assert torchs.part(torch.tensor(shares), torch.tensor(totals)).tolist() == wanted


def test_thresholds_are_exact() -> None:
    """Of weights as heavy as all may be together; every other time the product lies so little above
    a multiple of 2**53 that a carry lost from its lowest bits would show."""
    rng = random.Random(2)
    for trial in range(300):
        total, number = rng.getrandbits(63) | 1, rng.getrandbits(53) | 1
        if trial % 2:
            rest = rng.getrandbits(20) * pow(number, -1, 2**53) % 2**53
            total = rng.getrandbits(10) << 53 | rest | 1 << 62
        threshold = number * total >> 53
        weights = torch.tensor([[threshold, 1, max(0, total - threshold - 1)]])
        # The first weight reaches the threshold and does not exceed it.
        assert torchs.pick(weights, column([number])).tolist() == [1]
