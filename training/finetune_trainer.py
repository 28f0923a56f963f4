"""Optimizer steps of a fine-tuning: batches of examples in, changed weights out.

As in pre-training a step adds up the gradients of its parts, each divided by the units of the
whole step (tokens to be predicted, or rows), clips the sum and lets AdamW change what is trained.
So the parts of a batch add up to the batch whatever their number, even when their answers differ
in length. A step whose loss or gradient is not finite changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmserve import failpoints
from llmserve.errors import TrainingError

from .checkpoints import TrainingState
from .devices import autocast
from .finetune_examples import Example, RowOrder, batches
from .finetune_model import TunedModel
from .finetune_recipe import FinetuneRecipe
from .finetune_task import Task
from .optimizer_adamw import AdamW
from .schedule import learning_rate
from .workers import BatchWorkers

__all__ = ["FinetuneTrainer", "TuningStep"]

_FINAL_SHARE = 0.1
"""Learning rate at the end, as a share of the highest."""


@dataclass(frozen=True, slots=True)
class TuningStep:
    """What one optimizer step gave."""

    loss: float
    """Mean over the step's units, before it."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Rate of this step."""
    num_tokens: int
    """Tokens of its rows."""
    seconds: float
    """Time that it took."""
    is_skipped: bool
    """Whether loss or gradient was not finite, so that nothing changed."""


class FinetuneTrainer:
    """A model, its optimizer and its place among the examples. The caller saves and evaluates."""

    def __init__(
        self,
        tuned: TunedModel,
        task: Task[Any],
        examples: Sequence[Example],
        recipe: FinetuneRecipe,
        *,
        precision: Literal["float32", "bfloat16"],
        threads: int,
    ) -> None:
        """`examples` are what is trained on; at least one."""
        self.tuned = tuned
        """Changed in place by `run_step`."""
        self._task, self._examples, self._recipe = task, examples, recipe
        self._units = [task.units(example) for example in examples]
        self._order = RowOrder(
            [example.length for example in examples],
            batch_size=recipe.micro_batch_size,
            seed=recipe.seed,
        )
        is_whole = bool(recipe.dropout) or task.mixes_rows or tuned.device.type != "cpu"
        self._workers = BatchWorkers(
            threads=threads, max_parts=1 if is_whole else recipe.micro_batch_size
        )
        self.trainable = tuned.trainable()
        """What the optimizer changes, by name."""
        self._parameters = list(self.trainable.values())
        self.optimizer = AdamW(
            [
                {
                    "params": [p for p in self._parameters if p.ndim >= 2],
                    "weight_decay": recipe.weight_decay,
                },
                {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=recipe.highest_rate,
            betas=(0.9, 0.999),
        )
        """Its state belongs to `trainable`."""
        self.steps_per_epoch = math.ceil(self._order.batches_per_epoch / recipe.accumulation)
        """Optimizer steps in one pass."""
        planned = recipe.steps or max(1, round(recipe.epochs * self.steps_per_epoch))
        self.state = TrainingState(planned_steps=planned)
        """Advanced by `run_step`; its position counts parts of batches."""
        self._planned = planned
        self._is_bfloat16 = precision == "bfloat16"

    def run_step(self) -> TuningStep:
        """Make one optimizer step and advance `state`.

        Raises:
            TrainingError: more steps in a row were skipped than the recipe allows.
        """
        began = time.monotonic()
        rate = self._set_learning_rate()
        self.tuned.model.train()
        loss, num_tokens = self._accumulate()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip_norm))
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not is_skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.skipped_in_row = self.state.skipped_in_row + 1 if is_skipped else 0
        seconds = time.monotonic() - began
        self.state.seconds += seconds
        self._check_skipped()
        return TuningStep(loss, norm, rate, num_tokens, seconds, is_skipped)

    @torch.no_grad()
    def held_out_loss(self, examples: Sequence[Example]) -> float:
        """Mean loss of the examples' units in float32, or NaN without a unit."""
        self.tuned.model.eval()
        total, units = 0.0, sum(self._task.units(example) for example in examples)
        lengths = [example.length for example in examples]
        for indices in batches(lengths, self._recipe.micro_batch_size):
            total += float(self._task.loss(self.tuned, [examples[index] for index in indices]))
        return total / units if units else math.nan

    @torch.no_grad()
    def figures(self, examples: Sequence[Example]) -> dict[str, float]:
        """The task's figures on the examples, in float32."""
        self.tuned.model.eval()
        return self._task.figures(self.tuned, examples)

    def weights_are_finite(self) -> bool:
        """Whether what is trained may be saved."""
        return all(bool(torch.isfinite(p).all()) for p in self._parameters)

    def _accumulate(self) -> tuple[float, int]:
        """Add up the gradients of one batch; the mean loss of its units, and its tokens."""
        start, count = self.state.position, self._recipe.accumulation
        parts = [self._order.batch(position) for position in range(start, start + count)]
        units = sum(self._units[index] for part in parts for index in part)
        losses = []
        for position, part in enumerate(parts, start):
            failpoints.hit("train.micro_batch")
            if self._recipe.dropout:
                # Dropout draws from torch's global generator: a new one for every position.
                key = np.random.SeedSequence([self._recipe.seed, position])
                torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
            indices = torch.tensor(part)
            divisors = torch.full_like(indices, units)
            for loss, gradients in self._workers.map(self._part_gradients, indices, divisors):
                losses.append(loss)
                self._add(gradients)
        self.state.position += count
        rows = [row for part in parts for index in part for row in self._examples[index].rows]
        return float(torch.stack(losses).sum()), sum(len(row.ids) for row in rows)

    def _part_gradients(
        self, indices: Tensor, divisors: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        examples = [self._examples[index] for index in indices.tolist()]
        with autocast(self.tuned.device, torch.bfloat16 if self._is_bfloat16 else torch.float32):
            loss = self._task.loss(self.tuned, examples) / int(divisors[0])
        # An expert that no token of the part went through has no gradient.
        return loss.detach(), torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add to the batch's gradients: always part after part, since sums depend on the order."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def _set_learning_rate(self) -> float:
        rate = learning_rate(
            self.state.step,
            steps=self._planned,
            warmup_steps=int(self._recipe.warmup * self._planned),
            highest=self._recipe.highest_rate,
            final=_FINAL_SHARE * self._recipe.highest_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _check_skipped(self) -> None:
        if self.state.skipped_in_row > self._recipe.max_skipped_steps:
            raise TrainingError(
                f"{self.state.skipped_in_row} steps in a row, up to step {self.state.step}, had a "
                "loss or gradient that is not finite; the last checkpoint is kept. Try a lower "
                "learning_rate or precision float32"
            )
