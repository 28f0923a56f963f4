"""The gradient of a batch: read in parts, computed by threads or processes, added up in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmserve import failpoints
from llmserve.errors import ConfigError
from llmserve.model.transformer import Transformer

from .batches import Windows
from .distributed import Processes
from .objective import Objective
from .recipe import TrainingRecipe
from .workers import BatchWorkers

if TYPE_CHECKING:
    from .distributed_models import SharedModel

__all__ = ["BatchGradients", "check_processes"]

Part = tuple[Tensor, ...]
"""Rows of a batch as `Windows.read` gives them."""


class BatchGradients:
    """Leaves in a model's parameters the gradients of one batch after the other."""

    def __init__(
        self,
        model: Transformer,
        recipe: TrainingRecipe,
        windows: Windows,
        objective: Objective,
        *,
        threads: int,
        processes: Processes,
    ) -> None:
        """With dropout all threads work on one part at a time.

        torch draws what is dropped from one generator for the whole process, and parts side by
        side would mix up its order. So they do for a compiled model, on a GPU, and where several
        processes share the batch already.
        """
        is_one_part = recipe.dropout > 0 or recipe.compile or processes.count > 1
        is_one_part |= recipe.device != "cpu"
        self.workers = BatchWorkers(
            threads=threads, max_parts=1 if is_one_part else recipe.micro_batch_size
        )
        """The threads; evaluation uses them too."""
        self._recipe, self._windows, self._objective = recipe, windows, objective
        self._processes = processes
        self._parameters = list(model.parameters())
        self._num_targets, self._scale = 0, 1.0
        self._shared: SharedModel | None = None
        if processes.count > 1:
            from .distributed_models import SharedModel

            self._shared = SharedModel(model, processes)
            objective.forward = self._shared.forward

    def accumulate(self, position: int, *, scale: float) -> float:
        """Add up the gradients of the batch from window `position` on; the mean loss of its tokens.

        Losses are multiplied with `scale` on the way back, so that small gradients do not become
        zero in float16; it is taken out of the sum again, exactly if it is a power of two.
        """
        self._scale = scale
        self._num_targets = self._windows.num_targets(position, self._recipe.batch_size)
        parts = self._parts(position)
        if self._shared is None:
            losses = [loss for part in parts for loss in self._add_part(part)]
        else:
            losses = self._add_shared(self._shared, parts)
        if scale != 1.0:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad /= scale
        return float(self._processes.sum(torch.stack(losses).sum()))

    def _parts(self, position: int) -> Iterator[Part]:
        """The batch, part after part: this process's share of the windows of each."""
        count = self._recipe.micro_batch_size
        share = count // self._processes.count
        for start in range(position, position + self._recipe.batch_size, count):
            failpoints.hit("train.micro_batch")
            first = start + self._processes.rank * share
            if self._recipe.dropout:
                # Dropout draws from torch's global generator: a new one for every position.
                key = np.random.SeedSequence([self._recipe.seed, first])
                torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
            yield self._windows.read(first, share)

    def _add_part(self, part: Part) -> list[Tensor]:
        """Add a part's gradients, shared by threads; the losses of their pieces."""
        losses = []
        for loss, gradients in self.workers.map(self._differentiate, *part):
            losses.append(loss)
            self._add(gradients)
        return losses

    def _differentiate(self, *part: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, objective = self._scaled(*part)
        # An expert that no token went through has a gradient of zero.
        return loss, torch.autograd.grad(objective, self._parameters, materialize_grads=True)

    def _add(self, gradients: tuple[Tensor, ...]) -> None:
        """Add to the batch's gradients: always part after part, since sums depend on the order."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def _add_shared(self, shared: SharedModel, parts: Iterator[Part]) -> list[Tensor]:
        """Add everyone's gradients, which are exchanged with the last part; the own losses."""
        losses = []
        for index, part in enumerate(parts, start=1):
            with shared.part(is_last=index == self._recipe.accumulation):
                loss, objective = self._scaled(*part)
                shared.backward(objective)
            losses.append(loss)
        return losses

    def _scaled(self, *part: Tensor) -> tuple[Tensor, Tensor]:
        """A part's share of the mean loss, and what is differentiated."""
        loss, objective = self._objective.with_penalty(*part)
        return loss / self._num_targets, objective * self._scale / self._num_targets


def check_processes(recipe: TrainingRecipe, processes: Processes) -> None:
    """Raise `ConfigError` if the processes cannot share what the recipe asks for."""
    if recipe.micro_batch_size % processes.count:
        raise ConfigError(
            f"{processes.count} processes cannot share parts of {recipe.micro_batch_size} "
            "windows; change batch_size or accumulation"
        )
    if recipe.compile and processes.count > 1:
        raise ConfigError("compile works in one process alone; leave it out")
