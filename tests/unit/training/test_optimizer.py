"""AdamW's groups, and its state out and in."""

from __future__ import annotations

import pytest
import torch

from llmserve.errors import CheckpointError
from llmserve.model.transformer import Transformer
from llmserve.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from support.training_runs import tiny_config, tiny_recipe


def stepped() -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(tiny_config())
    optimizer = make_optimizer(model, tiny_recipe())
    model(torch.arange(16)[None]).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(tiny_config(norm="layernorm", mlp_bias=True))
    optimizer = make_optimizer(model, tiny_recipe(weight_decay=0.5, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_state_round_trip_is_exact() -> None:
    model, optimizer = stepped()
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    assert len(saved) == 3 * len(list(model.parameters()))
    fresh = make_optimizer(model, tiny_recipe())
    load_optimizer_tensors(fresh, model, saved)
    again = optimizer_tensors(fresh, model)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_state_of_another_model_is_refused() -> None:
    model, optimizer = stepped()
    saved = optimizer_tensors(optimizer, model)
    other = Transformer(tiny_config(num_layers=1))
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        load_optimizer_tensors(make_optimizer(other, tiny_recipe()), other, saved)
    wider = Transformer(tiny_config(intermediate_size=32))
    with pytest.raises(CheckpointError, match="mlp"):
        load_optimizer_tensors(make_optimizer(wider, tiny_recipe()), wider, saved)
