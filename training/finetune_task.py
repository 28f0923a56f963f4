"""What every task of fine-tuning has: examples from rows, a loss, and figures on held-out rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from llmserve.config import Head

from .finetune_examples import Example, Lengths, batches
from .finetune_model import TunedModel
from .finetune_rows import Row

__all__ = ["E", "Task", "in_batches", "log_likelihood"]

E = TypeVar("E", bound=Example)
T = TypeVar("T")
_ROWS_AT_ONCE = 16


class Task(ABC, Generic[E]):
    """One thing that a model can be tuned to. It keeps no weights; training leaves it alone."""

    head: Head | None = None
    """What the model needs in place of its output layer."""
    mixes_rows = False
    """Whether an example's loss depends on the others of its batch, which then stays whole."""

    inputs: str = ""
    """What else determines the loss beside rows and recipe, in words or digests."""

    @abstractmethod
    def example(self, row: Row, lengths: Lengths) -> E | None:
        """What `row` becomes; None if `lengths` left it out.

        Raises `DataError`, naming the row's place, if it is not of the task's shape.
        """

    @abstractmethod
    def loss(self, model: TunedModel, examples: Sequence[E]) -> Tensor:
        """The sum of the losses of all units of the examples; with gradients."""

    @abstractmethod
    def figures(self, model: TunedModel, examples: Sequence[E]) -> dict[str, float]:
        """Figures beside the loss on held-out examples; the caller turns gradients off."""

    def units(self, example: E) -> int:
        """By how many the loss is divided: an example counts as one unless the task says else."""
        return 1

    def prepare(self, model: TunedModel, examples: Sequence[E]) -> list[E]:
        """Examples with what must be computed by the model as it is before the first step."""
        return list(examples)

    def special_files(self) -> dict[str, bytes]:
        """Files that the finished folder needs beside the model's."""
        return {}

    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as the task's data show."""
        return ()


def in_batches(
    examples: Sequence[E], compute: Callable[[list[E]], Sequence[T]], size: int = _ROWS_AT_ONCE
) -> list[T]:
    """`compute` for all examples, in batches of like length; results in the examples' order."""
    results: dict[int, T] = {}
    for indices in batches([example.length for example in examples], size):
        values = compute([examples[index] for index in indices])
        results |= dict(zip(indices, values, strict=True))
    return [results[index] for index in range(len(examples))]


def log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over each row's targets of their log-probability: [B, T, V] and [B, T] → [B]."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return -losses.view(targets.shape).sum(dim=1)
