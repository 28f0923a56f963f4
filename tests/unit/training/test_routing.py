"""The balance loss against its definition, and what the watch counts."""

from __future__ import annotations

import pytest
import torch

from llmserve.model.transformer import Transformer
from llmserve.training.routing import RouterWatch
from support.training_runs import tiny_recipe

IDS = torch.arange(64).view(4, 16) * 37 % 300


def make() -> Transformer:
    recipe = tiny_recipe(num_experts=4)
    model = Transformer(recipe.model_config(vocab_size=300))
    model.initialize(torch.Generator().manual_seed(0))
    return model


def test_balance_loss_is_experts_times_share_times_probability() -> None:
    model = make()
    logits = []
    for block in model.layers:
        block.mlp.gate.register_forward_hook(lambda gate, inputs, out: logits.append(out))
    watch = RouterWatch(model)
    watch.start()
    model(IDS)
    found = watch.finish()
    expected = 0.0
    for layer in logits:
        chosen = layer.topk(2, dim=-1).indices
        shares = [(chosen == expert).float().mean() for expert in range(4)]
        probabilities = layer.softmax(-1).mean(0)
        expected += float(
            4 * sum(s * p for s, p in zip(shares, probabilities, strict=True)).detach()
        )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_router_that_cannot_tell_experts_apart_costs_one_a_layer() -> None:
    model = make()
    with torch.no_grad():
        for block in model.layers:
            block.mlp.gate.weight.zero_()
    watch = RouterWatch(model)
    watch.start()
    model(IDS)
    assert watch.finish().item() == pytest.approx(2.0)  # two layers


def test_choices_are_counted_between_start_and_finish_alone() -> None:
    model = make()
    watch = RouterWatch(model)
    model(IDS)
    assert watch.take_counts() == {}
    watch.start()
    model(IDS)
    watch.finish()
    model(IDS)
    counts = watch.take_counts()
    assert [int(count.sum()) for count in counts.values()] == [128, 128]
    assert watch.take_counts() == {}


def test_model_without_experts_has_nothing_to_balance() -> None:
    watch = RouterWatch(Transformer(tiny_recipe().model_config(vocab_size=300)))
    watch.start()
    assert watch.finish().item() == 0.0
