"""The loss of a part of a batch, in the recipe's precision and the recipe's way of computing it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmserve.errors import ConfigError
from llmserve.model.attention import Attend
from llmserve.model.transformer import Transformer

from .attention import make_attention
from .batches import IGNORED
from .devices import autocast, device_of, to_device
from .recipe import TrainingRecipe
from .recipe_fields import DeviceName
from .routing import RouterWatch

__all__ = ["Objective", "Precision", "recompute_blocks", "resolve_precision"]

Precision = Literal["float32", "bfloat16", "float16"]


class Objective:
    """Losses of one model. Threads may use it side by side."""

    def __init__(self, model: Transformer, recipe: TrainingRecipe, precision: Precision) -> None:
        """Raises `ConfigError` if the model is to be compiled and there is no compiler."""
        self._model = model
        self._device = device_of(model)
        self._dtype = getattr(torch, precision)
        self._is_mixed = precision != "float32"
        self._balance = recipe.balance_loss
        self._attend = self._attention(None)
        self.routers = RouterWatch(model)
        """What the experts' routers did in training."""
        self.forward: Callable[..., Tensor] = model
        """The model as training computes it."""
        if recipe.compile:
            self.forward = compiled(model, self._device)

    def loss_sum(self, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """Sum of the losses of `targets` [B, T] after `inputs` [B, T], all in the host's memory.

        `positions` [B, T] as `Windows.read` gives them, for rows of several documents.
        """
        return self._loss_sum(self._model, inputs, targets, positions)

    def with_penalty(
        self, inputs: Tensor, targets: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A part's `training_loss_sum`, and the same with the routers' balance loss per token."""
        self.routers.start()
        loss = self.training_loss_sum(inputs, targets, positions)
        balance = self.routers.finish()
        num_targets = (targets != IGNORED).sum()
        return loss.detach(), loss + self._balance * num_targets * balance

    def training_loss_sum(
        self, inputs: Tensor, targets: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """`loss_sum` on the way that gradients take: compiled, or spread over processes."""
        return self._loss_sum(self.forward, inputs, targets, positions)

    def _loss_sum(
        self,
        forward: Callable[..., Tensor],
        inputs: Tensor,
        targets: Tensor,
        positions: Tensor | None,
    ) -> Tensor:
        attend = self._attend if positions is None else self._attention(positions)
        inputs, targets = to_device(inputs, self._device), to_device(targets, self._device)
        if positions is not None:
            positions = to_device(positions, self._device)
        with autocast(self._device, self._dtype):
            logits = forward(inputs, attend, positions)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
        )

    def _attention(self, positions: Tensor | None) -> Attend:
        return make_attention(
            self._model.config, positions, is_mixed=self._is_mixed, device=self._device
        )


def compiled(model: Transformer, device: torch.device) -> Callable[..., Tensor]:
    """The model through torch.compile, at its first call. Raises `ConfigError`: no compiler."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(
            "compile needs a C++ compiler and found none of g++, clang++, c++; install one, or "
            "leave compile out"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError(
            "compile on cuda needs triton; pip install 'llmserve[gpu]', or leave compile out"
        )
    return torch.compile(model, dynamic=False)


def recompute_blocks(model: Transformer) -> None:
    """From now on keep only each block's input in training (arXiv:1604.06174)."""
    for block in model.layers:
        # What is set on a module goes before its class: the block stays what it is, by name too.
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Tensor], *arguments: object) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)  # type: ignore[no-any-return]


def resolve_precision(
    precision: Literal["auto", "float32", "bfloat16", "float16"], device: DeviceName = "cpu"
) -> Precision:
    """What "auto" means on this machine.

    bfloat16 products are several times faster than float32's where the device has instructions for
    them, and slower where it has not.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if is_fast else "float32"
