"""Routing and the sum over experts against their definitions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llmserve.config import Experts
from llmserve.model.experts import Gate, MixtureOfExperts, route
from support.variants import QWEN2_MOE, QWEN3_MOE

RULES = Experts(num_experts=4, num_experts_per_token=2, intermediate_size=8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(config: Any) -> MixtureOfExperts:
    experts = MixtureOfExperts(config, 0)
    with torch.no_grad():
        for index, parameter in enumerate(experts.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=index + 1))
    return experts.requires_grad_(False)


def test_likeliest_experts_are_chosen_and_their_weights_add_up_to_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 4.0]])
    chosen, weights = route(logits, RULES)
    assert chosen.tolist() == [[1, 3], [0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2.0], [5.0, 4.0]]).softmax(-1))


def test_weights_may_stay_shares_of_all_experts() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    _, weights = route(logits, dataclasses.replace(RULES, normalize_weights=False))
    torch.testing.assert_close(weights, logits.softmax(-1)[:, [1, 3]])


def test_of_equally_likely_experts_the_first_are_chosen() -> None:
    chosen, _ = route(torch.tensor([[1.0, 2.0, 1.0, 1.0], [7.0, 7.0, 7.0, 7.0]]), RULES)
    assert chosen.tolist() == [[1, 0], [0, 1]]


def test_weights_of_bfloat16_are_float32() -> None:
    _, weights = route(random(3, 4).bfloat16(), RULES)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("config", [QWEN2_MOE, QWEN3_MOE], ids=["shared", "routed alone"])
@pytest.mark.parametrize("is_fixed", [False, True])
def test_output_is_the_weighted_sum_of_the_chosen_experts(config: Any, is_fixed: bool) -> None:
    experts = make(config)
    x = random(2, 7, 24)
    if is_fixed:
        experts.fix_shapes()
    found = experts(x)
    for row, out in zip(x.view(-1, 24), found.view(-1, 24), strict=True):
        chosen, weights = route(experts.gate(row[None]), config.experts)
        expected = torch.zeros(24)
        for index, weight in zip(chosen[0].tolist(), weights[0], strict=True):
            expected += weight * experts.experts[index](row[None])[0]
        if experts.shared_expert is not None and experts.shared_expert_gate is not None:
            share = torch.sigmoid(experts.shared_expert_gate.weight @ row)
            expected += share * experts.shared_expert(row[None])[0]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_gate_that_is_filled_up_gives_the_same() -> None:
    gate = Gate(24, 5).requires_grad_(False)
    gate.weight.copy_(random(5, 24))
    x = random(9, 24, seed=1)
    plain = gate(x)
    gate.fill_up()
    assert gate(x).shape == (9, 5)
    torch.testing.assert_close(gate(x), plain)
    assert gate.weight.shape == (5, 24)
