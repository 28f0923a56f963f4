"""Optimizers, and their state as plain arrays.

AdamW (arXiv:1711.05101); the same with moments of a byte each, in blocks of 256 with a scale
(arXiv:2110.02861, through bitsandbytes); and Muon (Jordan et al. 2024; arXiv:2502.16982 for the
size of its updates, which lets it share AdamW's learning rate) for the matrices inside the blocks,
with AdamW for embeddings, output layer, norms and biases. Only matrices decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmserve.errors import CheckpointError

from .optimizer_8bit import make_adamw_8bit, prepare_8bit_state
from .optimizer_adamw import AdamW
from .recipe import TrainingRecipe

__all__ = ["Optimizer", "load_optimizer_tensors", "make_optimizer", "optimizer_tensors"]

_BLOCK = 256
"""Values of an 8-bit moment that share a scale."""

Named = list[tuple[str, nn.Parameter]]


class Optimizer:
    """One or two optimizers that share the parameters of a model."""

    def __init__(self, parts: Iterable[AdamW | torch.optim.Optimizer]) -> None:
        """`parts` own disjoint parameters."""
        self.parts = tuple(parts)
        """The optimizers."""
        self.param_groups: list[dict[str, Any]] = [
            group for part in self.parts for group in part.param_groups
        ]
        """All groups; what is set in one of them holds for the next step."""
        self._part_of = {
            parameter: part
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
        }

    def step(self) -> None:
        """Change the weights by their gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of one parameter, which may be changed; empty before the first step."""
        return self._part_of[parameter].state[parameter]

    def state_shapes(self, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
        """What the state of a parameter holds after a step: names and shapes."""
        part, shape = self._part_of[parameter], tuple(parameter.shape)
        if isinstance(part, torch.optim.Muon):
            return {"momentum_buffer": shape}
        if isinstance(part, AdamW):
            return {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
        shapes = {"state1": shape, "state2": shape, "step": ()}
        if self.state_of(parameter)["state1"].dtype == torch.uint8:
            blocks = (math.ceil(parameter.numel() / _BLOCK),)
            shapes |= {"absmax1": blocks, "absmax2": blocks}
        return shapes

    def prepare_state(self) -> None:
        """Give every parameter the empty state that its part expects to find, if it does."""
        for part in self.parts:
            if not isinstance(part, torch.optim.Muon | AdamW):
                prepare_8bit_state(part)


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> Optimizer:
    """The recipe's optimizer over all parameters that learn.

    Raises:
        MissingDependencyError: adamw8bit without bitsandbytes.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.optimizer == "adamw8bit":
        return Optimizer([make_adamw_8bit(_groups(named, recipe), **_adam_settings(recipe))])
    matrices = [pair for pair in named if recipe.optimizer == "muon" and _is_inner(*pair)]
    chosen = {name for name, _ in matrices}
    rest = [pair for pair in named if pair[0] not in chosen]
    adamw = AdamW(_groups(rest, recipe), **_adam_settings(recipe))
    if not matrices:
        return Optimizer([adamw])
    muon = torch.optim.Muon(
        [parameter for _, parameter in matrices],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizer([muon, adamw])


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state of every parameter, as `<part>.<parameter>`; none before the first step."""
    return {
        f"{part}.{name}": torch.as_tensor(optimizer.state_of(parameter)[part])
        for name, parameter in _learning(model)
        if optimizer.state_of(parameter)
        for part in optimizer.state_shapes(parameter)
    }


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    if not tensors:
        return
    optimizer.prepare_state()
    wanted = {
        f"{part}.{name}": (parameter, part, shape)
        for name, parameter in _learning(model)
        for part, shape in optimizer.state_shapes(parameter).items()
    }
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise CheckpointError(f"the optimizer's state does not fit the model: {odd[0]}")
    for name, tensor in tensors.items():
        parameter, part, shape = wanted[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"the optimizer's state does not fit the model: {name}")
        state = optimizer.state_of(parameter)
        is_count = isinstance(state.get(part), int)
        state[part] = int(tensor) if is_count else _copied(tensor, parameter.device)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.clone() if tensor.device == device else tensor.to(device)


def _learning(model: nn.Module) -> Named:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix between the embedding and the output: what Muon is made for."""
    return parameter.ndim == 2 and name.startswith("layers.")


def _groups(named: Named, recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """Norms and biases, being vectors, do not decay."""
    matrices = [parameter for _, parameter in named if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in named if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adam_settings(recipe: TrainingRecipe) -> dict[str, Any]:
    return {"lr": recipe.learning_rate, "betas": (recipe.beta1, recipe.beta2)}
