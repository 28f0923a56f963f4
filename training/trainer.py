"""Optimizer steps: windows of text in, changed weights out.

One step reads `batch_size` windows in `accumulation` parts, adds up their gradients, clips the sum
and lets the optimizer change the weights. The loss of every part is divided by the tokens of the
whole step, so that the parts add up to the gradient of the batch whatever their number, and
whether threads or processes share them. A step whose loss or gradient is not finite changes
nothing; too many in a row end the run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from llmserve.errors import TrainingError
from llmserve.model.transformer import Transformer

from .batches import Windows
from .checkpoints import TrainingState
from .distributed import ALONE, Processes
from .distributed_weights import local, number
from .gradients import BatchGradients, check_processes
from .monitor_layers import LayerFigures, LayerMeter
from .objective import Objective, Precision, recompute_blocks
from .optimizer import make_optimizer
from .recipe import TrainingRecipe
from .schedule import learning_rate
from .weight_average import WeightAverage

__all__ = ["StepResult", "Trainer"]

_FIRST_LOSS_SCALE = 2.0**16
_GOOD_STEPS_PER_DOUBLING = 2000
"""Steps without overflow after which the loss of a float16 run is scaled up again."""


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
    layers: LayerFigures | None = None
    """Figures of each layer, if they were asked for."""


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
        processes: Processes = ALONE,
    ) -> None:
        """`windows` are the text to train on; `model` lies where it is to be trained.

        Raises:
            ConfigError: several processes that cannot share the parts of a batch evenly, or are to
                compile the model; or there is no compiler for it.
        """
        check_processes(recipe, processes)
        self.model = model
        """Changed in place by `run_step`."""
        self.processes = processes
        """Who shares the run."""
        if recipe.activation_checkpointing:
            recompute_blocks(model)
        if processes.count > 1 and recipe.parallel == "fsdp":
            from .distributed_models import shard_model

            shard_model(model, processes)
        self.objective = Objective(model, recipe, precision)
        """The loss, and what the routers of experts did."""
        self._gradients = BatchGradients(
            model, recipe, windows, self.objective, threads=threads, processes=processes
        )
        self.optimizer = make_optimizer(model, recipe)
        """Its state belongs to the parameters of `model`."""
        self.state = TrainingState(planned_steps=recipe.steps)
        """Advanced by `run_step`."""
        if precision == "float16":
            self.state.loss_scale = _FIRST_LOSS_SCALE
        decay = recipe.ema_decay
        self.average = None if decay is None else WeightAverage(model, decay)
        """Averaged weights, if the recipe asks for them."""
        self._recipe = recipe
        self._windows = windows
        self._parameters = list(model.parameters())
        self._meter = LayerMeter(model, processes)

    @property
    def tokens_per_step(self) -> int:
        """Places in the windows of one step; packed documents leave some of them unused."""
        return self._recipe.batch_size * self._recipe.max_seq_len

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of one pass over the text."""
        return self._windows.windows_per_epoch * self._recipe.max_seq_len

    def run_step(self, *, measure_layers: bool = False) -> StepResult:
        """Make one optimizer step and advance `state`.

        `measure_layers` compares the weights before and after, and costs a copy of them.

        Raises:
            TrainingError: more steps in a row were skipped than the recipe allows.
        """
        began = time.monotonic()
        rate = self._set_learning_rate()
        self.model.train()
        loss = self._gradients.accumulate(self.state.position, scale=self.state.loss_scale)
        grad_norms = self._meter.grad_norms() if measure_layers else {}
        norm = number(torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip_norm))
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        layers = None
        if not is_skipped:
            before = self._meter.weights() if measure_layers else None
            self.optimizer.step()
            if before is not None:
                layers = LayerFigures(grad_norms, self._meter.update_ratios(before))
        self.optimizer.zero_grad(set_to_none=True)
        self._advance(is_skipped=is_skipped)
        self.state.seconds += time.monotonic() - began
        self._check_skipped()
        return StepResult(loss, norm, rate, is_skipped, layers)

    def loss_sum(self, *batch: Tensor) -> Tensor:
        """Sum of the losses of a batch as `Windows.read` gives it, without gradients.

        Processes share the rows; all must call it.
        """
        rank, count = self.processes.rank, self.processes.count
        has_row = rank < len(batch[0])
        own = [rows[rank::count] if has_row else rows[:1] for rows in batch]

        def part_loss(*part: Tensor) -> Tensor:
            with torch.no_grad():  # each thread has a mode of its own
                return self.objective.loss_sum(*part)

        loss = torch.stack(self._gradients.workers.map(part_loss, *own)).sum()
        # Where there are fewer rows than processes, the rest computes one for nothing: it may hold
        # weights that the others need.
        return self.processes.sum(loss if has_row else torch.zeros_like(loss))

    def weights_are_finite(self) -> bool:
        """Whether the model may be saved."""
        is_whole = all(bool(torch.isfinite(local(p.detach())).all()) for p in self._parameters)
        return not self.processes.any(not is_whole)

    def _set_learning_rate(self) -> float:
        rate = learning_rate(
            self.state.step,
            steps=self.state.planned_steps,
            warmup_steps=self._recipe.warmup_steps,
            highest=self._recipe.learning_rate,
            final=self._recipe.final_learning_rate,
            schedule=self._recipe.schedule,
            decay_share=self._recipe.decay_share,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _advance(self, *, is_skipped: bool) -> None:
        state = self.state
        state.step += 1
        state.position += self._recipe.batch_size
        if is_skipped and state.loss_scale > 1.0:  # an overflow, which a smaller scale mends
            state.loss_scale, state.steps_at_scale = state.loss_scale / 2, 0
            return
        state.skipped_in_row = state.skipped_in_row + 1 if is_skipped else 0
        state.steps_at_scale += 1
        if state.loss_scale > 1.0 and state.steps_at_scale == _GOOD_STEPS_PER_DOUBLING:
            state.loss_scale, state.steps_at_scale = state.loss_scale * 2, 0
        if self.average is not None and not is_skipped:
            self.average.update(state.step)

    def _check_skipped(self) -> None:
        if self.state.skipped_in_row > self._recipe.max_skipped_steps:
            raise TrainingError(
                f"{self.state.skipped_in_row} steps in a row, up to step {self.state.step}, had a "
                "loss or gradient that is not finite; the last checkpoint is kept. Try a lower "
                "learning_rate, a longer warm-up or precision float32"
            )
