"""AdamW (arXiv:1711.05101), with decay on matrices only, and its state as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llmserve.errors import CheckpointError

from .recipe import TrainingRecipe

__all__ = ["load_optimizer_tensors", "make_optimizer", "optimizer_tensors"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.AdamW:
    """An optimizer over all parameters; norms and biases, being vectors, do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True
    )


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, torch.Tensor]:
    """Both moments and the step count of every parameter, as `<moment>.<parameter>`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    wanted = {
        f"{moment}.{name}": (parameter, moment)
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }
    if tensors and wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise CheckpointError(f"the optimizer's state does not fit the model: {odd[0]}")
    for name, tensor in tensors.items():
        parameter, moment = wanted[name]
        expected = torch.Size([]) if moment == "step" else parameter.shape
        if tensor.shape != expected:
            raise CheckpointError(f"the optimizer's state does not fit the model: {name}")
        optimizer.state[parameter][moment] = tensor.clone()
