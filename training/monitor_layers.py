"""What a step did to each layer: the norm of its gradient, and how far its weights moved.

A layer's update ratio is the norm of the change of its weights over the norm of the weights. Around
one in a thousand is usual; far less and the layer hardly learns, far more and it forgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmserve.model.transformer import Transformer

from .distributed import Processes
from .distributed_weights import is_sharded, local, square_sums

__all__ = ["LayerFigures", "LayerMeter"]


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """Figures by layer, from the embedding to the output: `embedding`, `layer 0`, ..., `output`."""

    grad_norms: dict[str, float]
    """Norm of each layer's gradient, before clipping."""
    update_ratios: dict[str, float]
    """Change of each layer's weights in the step, relative to them."""


class LayerMeter:
    """Measures a model, of which this process may hold a part."""

    def __init__(self, model: Transformer, processes: Processes) -> None:
        self._groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self._groups.setdefault(layer_of(name), []).append(parameter)
        self._processes = processes
        self._is_shared = is_sharded(model)

    def grad_norms(self) -> dict[str, float]:
        """Norms of the gradients as they are now."""
        return self._norms(
            [[p.grad for p in group if p.grad is not None] for group in self._groups.values()]
        )

    def weights(self) -> list[Tensor]:
        """A copy of all weights, in the order of the layers."""
        return [local(p.detach()).clone() for group in self._groups.values() for p in group]

    def update_ratios(self, before: list[Tensor]) -> dict[str, float]:
        """How far the weights are from those `before`, which are used up."""
        rest = iter(before)
        groups = [[next(rest) for _ in group] for group in self._groups.values()]
        size = self._norms(groups)
        for old, group in zip(groups, self._groups.values(), strict=True):
            torch._foreach_sub_(old, [local(p.detach()) for p in group])
        moved = self._norms(groups)
        return {name: moved[name] / size[name] if size[name] else 0.0 for name in moved}

    def _norms(self, groups: list[list[Tensor]]) -> dict[str, float]:
        squares = square_sums(groups, self._processes, shared=self._is_shared)
        return dict(zip(self._groups, squares.sqrt().tolist(), strict=True))


def layer_of(parameter_name: str) -> str:
    """The layer that a parameter belongs to, as a reader counts them."""
    first, _, rest = parameter_name.partition(".")
    if first == "layers":
        return f"layer {rest.partition('.')[0]}"
    return "embedding" if first.startswith("embed") else "output"
