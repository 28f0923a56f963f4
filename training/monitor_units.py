"""Units of the feed-forwards that never do anything: dead weight.

A unit is one number inside a feed-forward, between its two products. It is dead here if over all
tokens of some held-out windows its largest magnitude stays under a thousandth of its layer's root
mean square.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmserve.model.half_blocks import Mlp
from llmserve.model.transformer import Transformer

from .devices import beside

__all__ = ["dead_units"]

_SHARE_OF_RMS = 1e-3


def dead_units(model: Transformer, inputs: Tensor) -> dict[str, float]:
    """For each layer the share of units that are dead on the windows `inputs` [B, T]; 0..1.

    Of a layer with experts, all experts' units count, so that an idle expert is dead weight too.
    """
    meters = {
        f"layer {index}": [_UnitMeter(m) for m in block.modules() if isinstance(m, Mlp)]
        for index, block in enumerate(model.layers)
    }
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(*beside(model, inputs))
    finally:
        model.train(was_training)
        for meter in (meter for layer in meters.values() for meter in layer):
            meter.remove()
    return {name: _dead_share(layer) for name, layer in meters.items()}


class _UnitMeter:
    """Keeps the largest magnitude of each unit of one feed-forward, and the sum of squares."""

    def __init__(self, mlp: Mlp) -> None:
        weight = mlp.down_proj.weight
        self.largest = torch.zeros(weight.shape[1], device=weight.device)
        self.squares, self.count = torch.zeros((), device=weight.device), 0
        self.remove: Callable[[], None] = mlp.down_proj.register_forward_pre_hook(self._see).remove

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().float().flatten(0, -2)  # [tokens, units]
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(0))
            self.squares = self.squares + rows.square().sum()
            self.count += rows.numel()


def _dead_share(meters: list[_UnitMeter]) -> float:
    largest = torch.cat([meter.largest for meter in meters])
    squares = torch.stack([meter.squares for meter in meters]).sum()
    rms = (squares / max(1, sum(meter.count for meter in meters))).sqrt()
    return float((largest <= _SHARE_OF_RMS * rms).float().mean())
