"""Averaged weights: an exponential moving average over the steps (arXiv:1806.05594, 3.2; EMA).

The average follows the weights fast at first, by min(decay, (1 + n) / (10 + n)) after n steps, so
that the random initial weights do not stay in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llmserve.errors import CheckpointError

from .distributed_weights import local

__all__ = ["WeightAverage"]


class WeightAverage:
    """The average of a model's weights, in the type and on the processes that these are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in self._weights.items()
        }
        """The average of each parameter, by name."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, weight in self._weights.items():
            local(self.tensors[name]).lerp_(local(weight.detach()), 1 - kept)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` held. Raises `CheckpointError` if it does not fit the model."""
        wrong = {name for name, own in self.tensors.items() if own.shape != _shape(tensors, name)}
        wrong |= tensors.keys() - self.tensors.keys()
        if wrong:
            raise CheckpointError(f"the averaged weights do not fit the model: {min(wrong)}")
        for name, own in self.tensors.items():
            own.copy_(tensors[name])

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the average for as long as the block lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own, average = local(weight.detach()), local(self.tensors[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
