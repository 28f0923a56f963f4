"""Which optimizer has which weights, and its state out and in."""

from __future__ import annotations

import pytest
import torch

from llmserve.errors import CheckpointError
from llmserve.model.transformer import Transformer
from llmserve.training.optimizer import (
    Optimizer,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from support.training_runs import tiny_config, tiny_recipe

KINDS = ["adamw", "muon", pytest.param("adamw8bit", marks=pytest.mark.bnb)]


def make(kind: str) -> tuple[Transformer, Optimizer]:
    model = Transformer(tiny_config())
    model.initialize(torch.Generator().manual_seed(0))
    return model, make_optimizer(model, tiny_recipe(optimizer=kind))


def step(model: Transformer, optimizer: Optimizer) -> None:
    model(torch.arange(16)[None]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def stepped(kind: str = "adamw") -> tuple[Transformer, Optimizer]:
    model, optimizer = make(kind)
    step(model, optimizer)
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


@pytest.mark.parametrize("kind", KINDS)
def test_with_its_state_back_the_next_step_is_the_same(kind: str) -> None:
    model, optimizer = stepped(kind)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    again, fresh = make(kind)
    again.load_state_dict(model.state_dict())
    load_optimizer_tensors(fresh, again, saved)
    assert optimizer_tensors(fresh, again).keys() == saved.keys()
    for each, its in ((model, optimizer), (again, fresh)):
        step(each, its)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_has_the_matrices_of_the_blocks() -> None:
    model, optimizer = stepped("muon")
    for name, parameter in model.named_parameters():
        is_inner = name.startswith("layers.") and parameter.ndim == 2
        assert (optimizer.state_of(parameter).keys() == {"momentum_buffer"}) == is_inner, name


@pytest.mark.bnb
def test_moments_of_large_matrices_take_a_byte() -> None:
    model, optimizer = stepped("adamw8bit")
    tensors = optimizer_tensors(optimizer, model)
    assert tensors["state1.embed_tokens.weight"].dtype == torch.uint8
    assert tensors["state1.norm.weight"].dtype == torch.float32
    assert "absmax1.norm.weight" not in tensors


def test_state_of_another_model_is_refused() -> None:
    model, optimizer = stepped()
    saved = optimizer_tensors(optimizer, model)
    other = Transformer(tiny_config(num_layers=1))
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        load_optimizer_tensors(make_optimizer(other, tiny_recipe()), other, saved)
    wider = Transformer(tiny_config(intermediate_size=32))
    with pytest.raises(CheckpointError, match="mlp"):
        load_optimizer_tensors(make_optimizer(wider, tiny_recipe()), wider, saved)
