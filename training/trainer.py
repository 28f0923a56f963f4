"""Optimizer steps: windows of text in, changed weights out.

One step reads `batch_size` windows in `accumulation` parts, adds up their gradients, clips the sum
and lets AdamW change the weights. The loss of every part is divided by the tokens of the whole
step, so that the parts add up to the gradient of the batch whatever their number. A step whose
loss or gradient is not finite changes nothing; too many in a row end the run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llmserve import failpoints
from llmserve.errors import TrainingError
from llmserve.model.transformer import Transformer

from .attention import make_attention
from .batches import Windows
from .checkpoints import TrainingState
from .optimizer import make_optimizer
from .recipe import TrainingRecipe
from .schedule import learning_rate
from .workers import BatchWorkers

__all__ = ["StepResult", "Trainer", "resolve_precision"]

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Nats per token before the step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Rate of this step."""
    is_skipped: bool
    """Whether loss or gradient was not finite, so that nothing changed."""


class Trainer:
    """A model, its optimizer and its place in the text. The caller saves and evaluates."""

    def __init__(
        self,
        model: Transformer,
        recipe: TrainingRecipe,
        windows: Windows,
        *,
        precision: Precision,
        threads: int,
    ) -> None:
        """`windows` are the text to train on.

        With dropout all threads work on one part at a time: torch draws what is dropped from one
        generator for the whole process, and parts side by side would mix up its order.
        """
        self.model = model
        """Changed in place by `run_step`."""
        self.optimizer = make_optimizer(model, recipe)
        """Its state belongs to the parameters of `model`."""
        self.state = TrainingState(planned_steps=recipe.steps)
        """Advanced by `run_step`."""
        self._recipe = recipe
        self._windows = windows
        self._workers = BatchWorkers(
            threads=threads, max_parts=1 if recipe.dropout else recipe.micro_batch_size
        )
        self._parameters = list(model.parameters())
        self._is_bfloat16 = precision == "bfloat16"

    @property
    def tokens_per_step(self) -> int:
        """Places in the windows of one step; packed documents leave some of them unused."""
        return self._recipe.batch_size * self._recipe.max_seq_len

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of one pass over the text."""
        return self._windows.windows_per_epoch * self._recipe.max_seq_len

    def run_step(self) -> StepResult:
        """Make one optimizer step and advance `state`.

        Raises:
            TrainingError: more steps in a row were skipped than the recipe allows.
        """
        began = time.monotonic()
        rate = self._set_learning_rate()
        self.model.train()
        loss = self._accumulate()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip_norm))
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not is_skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.skipped_in_row = self.state.skipped_in_row + 1 if is_skipped else 0
        self.state.seconds += time.monotonic() - began
        self._check_skipped()
        return StepResult(loss, norm, rate, is_skipped)

    def loss_sum(self, *batch: Tensor) -> Tensor:
        """Sum of the losses of a batch as `Windows.read` gives it, without gradients."""

        def part_loss(*part: Tensor) -> Tensor:
            with torch.no_grad():  # each thread has a mode of its own
                return self.part_loss(*part)

        return torch.stack(self._workers.map(part_loss, *batch)).sum()

    def part_loss(self, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """`loss_sum` of one part, as training computes it, on the thread that calls."""
        attend = make_attention(self.model.config, positions, in_bfloat16=self._is_bfloat16)
        # Cached casts belong to one graph; two threads would share them.
        with torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=self._is_bfloat16, cache_enabled=False
        ):
            logits = self.model(inputs, attend, positions)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
        )

    def weights_are_finite(self) -> bool:
        """Whether the model may be saved."""
        return all(bool(torch.isfinite(p).all()) for p in self._parameters)

    def _accumulate(self) -> float:
        """Add up the gradients of one batch; the mean loss of its tokens."""
        losses = []
        num_targets = self._windows.num_targets(self.state.position, self._recipe.batch_size)
        gradients_of = partial(self._part_gradients, num_targets)
        for _ in range(self._recipe.accumulation):
            failpoints.hit("train.micro_batch")
            count = self._recipe.micro_batch_size
            batch = self._windows.read(self.state.position, count)
            if self._recipe.dropout:
                # Dropout draws from torch's global generator: a new one for every position.
                key = np.random.SeedSequence([self._recipe.seed, self.state.position])
                torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
            for loss, gradients in self._workers.map(gradients_of, *batch):
                losses.append(loss)
                self._add(gradients)
            self.state.position += count
        return float(torch.stack(losses).sum())

    def _part_gradients(self, num_targets: int, *part: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.part_loss(*part) / num_targets
        return loss.detach(), torch.autograd.grad(loss, self._parameters)

    def _add(self, gradients: tuple[Tensor, ...]) -> None:
        """Add to the batch's gradients: always part after part, since sums depend on the order."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def _set_learning_rate(self) -> float:
        rate = learning_rate(
            self.state.step,
            steps=self.state.planned_steps,
            warmup_steps=self._recipe.warmup_steps,
            highest=self._recipe.learning_rate,
            final=self._recipe.final_learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _check_skipped(self) -> None:
        if self.state.skipped_in_row > self._recipe.max_skipped_steps:
            raise TrainingError(
                f"{self.state.skipped_in_row} steps in a row, up to step {self.state.step}, had a "
                "loss or gradient that is not finite; the last checkpoint is kept. Try a lower "
                "learning_rate, a longer warm-up or precision float32"
            )


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """What "auto" means on this machine.

    bfloat16 products are several times faster than float32's where the processor has instructions
    for them, and slower where it has not.
    """
    if precision != "auto":
        return precision
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if is_fast else "float32"
