"""Weights of which a process may hold a part, without a word of torch.distributed.

Only a run of several processes imports what shards a model (`distributed_models.py`): it takes a
second and 40 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import Processes

__all__ = ["is_part", "is_sharded", "local", "number", "square_sums"]


def is_part(tensor: Tensor) -> bool:
    """Whether the tensor is one of torch's DTensors, of which each process holds some rows."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, which is all of it unless it is sharded."""
    return getattr(tensor, "to_local", lambda: tensor)()


def number(value: Tensor) -> float:
    """The number of a tensor without axes, which all processes ask for together if it is shared."""
    return float(getattr(value, "full_tensor", lambda: value)())


def is_sharded(model: nn.Module) -> bool:
    """Whether `distributed_models.shard_model` was called on it."""
    return any(is_part(parameter) for parameter in model.parameters())


def square_sums(groups: list[list[Tensor]], processes: Processes, *, shared: bool) -> Tensor:
    """Sum of the squares of each group of tensors, over all processes' parts if `shared`."""
    device = next((tensor.device for group in groups for tensor in group), torch.device("cpu"))
    sums = torch.stack([_square_sum(group, device) for group in groups])
    return processes.sum(sums) if shared else sums


def _square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm([local(tensor) for tensor in tensors])
    return torch.stack([norm.double().square() for norm in norms]).sum()
