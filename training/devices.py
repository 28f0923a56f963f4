"""Where a training computes: the processor, or one NVIDIA GPU for each process."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from llmserve.errors import ConfigError
from llmserve.runners.torch_devices import checked_device

from .recipe_fields import DeviceName

__all__ = ["autocast", "beside", "device_of", "to_device", "training_device"]


def training_device(name: DeviceName, *, local_rank: int = 0) -> torch.device:
    """The device of a process: with `cuda` the GPU that its place on this machine counts.

    Raises:
        ConfigError: torch finds no such GPU, or fewer than processes.
    """
    if name == "cpu":
        return torch.device("cpu")
    checked_device(name)
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ConfigError(
            f"device cuda: {local_rank + 1} processes or more on this machine, and torch finds "
            f"{found} GPUs, one for each; start fewer processes"
        )
    return torch.device("cuda", local_rank)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A batch's tensor on the device; the host does not wait for a GPU's copy of it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Products in a type of two bytes; with float32 nothing changes."""
    if dtype is torch.float32:
        return contextlib.nullcontext()
    # On a CPU, cached casts belong to one graph; two threads would share them.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=device.type != "cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def beside(model: nn.Module, *tensors: Tensor) -> list[Tensor]:
    """A batch's tensors where the model's parameters are."""
    device = device_of(model)
    return [to_device(tensor, device) for tensor in tensors]
