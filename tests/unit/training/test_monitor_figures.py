"""Repeats in the text, dead units, and how much arithmetic a model is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.model.transformer import Transformer
from llmserve.training.monitor_flops import peak_flops, training_flops_per_token
from llmserve.training.monitor_repeats import repeated_share
from llmserve.training.monitor_units import dead_units
from support.training_runs import tiny_config, tiny_recipe

IDS = torch.arange(64).view(4, 16)


def random_ids(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5000, count).astype(np.uint16)


def test_text_without_repeats_has_none() -> None:
    assert repeated_share(random_ids(50_000)) == 0.0
    assert repeated_share(random_ids(10)) == 0.0


@pytest.mark.parametrize("offset", [0, 1, 333])
def test_copy_of_a_half_is_a_third_of_the_whole(offset: int) -> None:
    text = random_ids(40_000)
    ids = np.concatenate([text, random_ids(offset, seed=1), text[:20_000]])
    assert repeated_share(ids) == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_units_whose_weights_are_zero_are_dead(activation: str) -> None:
    model = Transformer(tiny_config(activation=activation))
    model.initialize(torch.Generator().manual_seed(0))
    assert dead_units(model, IDS) == {"layer 0": 0.0, "layer 1": 0.0}
    projection = "gate_up_proj" if activation == "swiglu" else "up_proj"
    with torch.no_grad():
        model.layers[1].mlp.get_submodule(projection).weight[:6] = 0.0
    model.train()
    assert dead_units(model, IDS) == {"layer 0": 0.0, "layer 1": pytest.approx(6 / 24)}
    assert model.training
    before = len(model.layers[1].mlp.down_proj._forward_pre_hooks)
    assert before == 0


def test_idle_experts_are_dead_weight() -> None:
    model = Transformer(
        tiny_recipe(num_experts=4, num_experts_per_token=1).model_config(vocab_size=300)
    )
    with torch.no_grad():
        model.layers[0].mlp.gate.weight.zero_()  # all tokens go to the first
    assert dead_units(model, IDS)["layer 0"] == pytest.approx(3 / 4, abs=0.05)


def test_operations_are_six_for_each_weight_and_those_of_attention() -> None:
    config = tiny_config()
    model = Transformer(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    attention = 12 * 2 * 16 * 16
    assert training_flops_per_token(config) == 6 * matrices + attention
    untied = tiny_config(tie_word_embeddings=False)
    assert training_flops_per_token(untied) == 6 * matrices + attention
    learned = tiny_config(positions="learned")
    assert training_flops_per_token(learned) == 6 * matrices + attention


def test_experts_that_a_token_does_not_see_cost_nothing() -> None:
    def flops(num_experts: int) -> int:
        recipe = tiny_recipe(num_experts=num_experts, num_experts_per_token=2)
        return training_flops_per_token(recipe.model_config(vocab_size=300))

    routers = 6 * 2 * 16 * (8 - 2)
    assert flops(8) - flops(2) == routers


def test_peak_grows_with_threads_and_leaves_their_number_alone() -> None:
    assert peak_flops("float32", torch.device("cpu"), threads=3) > 1e8
    assert torch.get_num_threads() == 1
