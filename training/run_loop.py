"""The loop of a run: steps, with evaluations, log lines and checkpoints between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmserve.config import ModelConfig
from llmserve.errors import TrainingError
from llmserve.model.transformer import Transformer
from llmserve.text.tokenizer import Tokenizer

from .checkpoints import load_checkpoint, save_checkpoint
from .data_windows import describe_windows, evaluate_text, open_windows
from .finish import finish_run
from .log import TrainingLog
from .plan import StepPlanner
from .prepare import PreparedText
from .recipe import TrainingRecipe
from .run_folder import RunFolder
from .stop_signals import StopSignals
from .trainer import Trainer

__all__ = ["Reporter", "RunLoop", "RunOutcome"]

_LOG_EVERY = 10
"""Steps whose means make one line of the log."""


class Reporter(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None:
        """Something happened that is worth a line."""

    def progress(self, step: int, steps: int | None, *, loss: float, tokens_per_s: float) -> None:
        """`step` of `steps` are done; None: not planned yet."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How `run_training` ended."""

    model: Path
    """The finished model folder."""
    result: dict[str, Any] | None
    """Its figures; None if the run was stopped before its end."""
    stopped_by: int | None = None
    """The signal that stopped it."""


class RunLoop:
    """One process's part of a run."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: TrainingRecipe,
        record: dict[str, Any],
        text: PreparedText,
        reporter: Reporter,
        began: float,
    ) -> None:
        self._folder, self._recipe, self._record = folder, recipe, record
        self._text, self._reporter = text, reporter
        self._config = _model_config(recipe, text.tokenizer)
        model = Transformer(self._config, dropout=recipe.dropout)
        model.initialize(torch.Generator().manual_seed(recipe.seed))
        self._windows = open_windows(text.train, recipe, end_id=text.tokenizer.eos_token_id)
        self._trainer = Trainer(
            model,
            recipe,
            self._windows,
            precision=record["precision"],
            threads=record["threads"],
        )
        self._restore()
        self._planner = (
            StepPlanner(minutes=recipe.minutes, began=began)
            if recipe.minutes is not None and self._planned is None
            else None
        )
        self._log = TrainingLog(folder.log, last_step=self._step)
        self._since_log: list[tuple[float, float]] = []
        self._logged_at = self._trainer.state.seconds
        self._held_out: tuple[int, float] | None = None

    @property
    def _step(self) -> int:
        return self._trainer.state.step

    @property
    def _planned(self) -> int | None:
        return self._trainer.state.planned_steps

    def run(self) -> RunOutcome:
        """Train to the end, or until a signal; then finish, or leave a checkpoint."""
        self._announce()
        with self._log, StopSignals() as stop:
            while not self._is_done():
                self._one_step()
                if stop.received is not None:
                    self._checkpoint()
                    return RunOutcome(self._folder.model, None, stop.received)
            self._checkpoint()
        result = finish_run(self._folder, self._recipe, self._record, self._text, self._trainer)
        return RunOutcome(self._folder.model, result)

    def _announce(self) -> None:
        state, model = self._trainer.state, self._trainer.model
        count = sum(parameter.numel() for parameter in model.parameters())
        self._reporter.note(
            f"{count:,} parameters, vocabulary {self._config.vocab_size}, "
            f"{len(self._text.train.ids):,} tokens to train on, "
            f"{len(self._text.held_out.ids):,} held out, {self._record['precision']}, "
            f"{self._record['threads']} threads"
        )
        self._reporter.note(describe_windows(self._windows))
        if state.step:
            self._reporter.note(f"going on from step {state.step}")

    def _is_done(self) -> bool:
        return self._planned is not None and self._step >= self._planned

    def _one_step(self) -> None:
        result = self._trainer.run_step()
        if result.is_skipped:
            self._reporter.note(f"step {self._step} skipped: loss or gradient is not finite")
        else:
            self._since_log.append((result.loss, result.grad_norm))
        self._plan()
        if self._step % _LOG_EVERY == 0 or self._is_done():
            self._write_log(result.learning_rate)
        if self._step % self._recipe.evaluate_every == 0:
            self._evaluate()
        if self._step % self._recipe.checkpoint_every == 0 and not self._is_done():
            self._checkpoint()

    def _plan(self) -> None:
        if self._planner is None:
            return
        planned = self._planner.after_step(self._step)
        if planned is not None:
            passes, tokens = self._recipe.max_passes, self._trainer.tokens_per_epoch
            if passes is not None:
                step_tokens = self._recipe.batch_size * self._recipe.max_seq_len
                planned = min(planned, max(self._step, int(passes * tokens / step_tokens)))
            self._trainer.state.planned_steps = planned
            self._planner = None
            # From here on the run is exact, so no step before must ever be made again.
            self._checkpoint()
            self._record["planned_steps"] = planned
            self._folder.write_run(self._record)
            limit = "" if passes is None else f", {passes:g} passes at most"
            minutes = self._recipe.minutes
            self._reporter.note(f"{planned} steps planned for {minutes:g} minutes{limit}")

    def _write_log(self, rate: float) -> None:
        seconds = self._trainer.state.seconds
        if self._since_log:
            count = len(self._since_log)
            loss, norm = (sum(values) / count for values in zip(*self._since_log, strict=True))
            speed = count * self._trainer.tokens_per_step / (seconds - self._logged_at)
            self._log.write(
                {
                    "step": self._step,
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "tokens_per_s": speed,
                }
            )
            self._reporter.progress(self._step, self._planned, loss=loss, tokens_per_s=speed)
        self._since_log = []
        self._logged_at = seconds

    def _evaluate(self) -> None:
        loss, _ = evaluate_text(
            self._trainer.model,
            self._text.held_out,
            self._recipe,
            end_id=self._text.tokenizer.eos_token_id,
            max_tokens=self._recipe.evaluation_tokens,
            loss_sum=self._trainer.loss_sum,
        )
        self._held_out = (self._step, loss)
        self._log.write({"step": self._step, "held_out_loss": loss})
        self._reporter.note(f"step {self._step}: held-out loss {loss:.4f}")

    def _checkpoint(self) -> None:
        if not self._trainer.weights_are_finite():
            raise TrainingError(
                f"the weights are not finite after step {self._step}; the last checkpoint is kept. "
                "Try a lower learning_rate or precision float32"
            )
        trainer, keep = self._trainer, self._recipe.keep_checkpoints
        with self._folder.new_checkpoint(self._step, keep=keep) as path:
            save_checkpoint(
                path,
                trainer.model,
                trainer.optimizer,
                trainer.state,
                tokenizer=self._folder.tokenizer,
            )
        if self._held_out is not None and self._held_out[0] == self._step:
            self._folder.mark_if_best(*self._held_out)

    def _restore(self) -> None:
        path = self._folder.last_checkpoint()
        if path is not None:
            trainer = self._trainer
            trainer.state = load_checkpoint(path, trainer.model, trainer.optimizer)
            self._record["planned_steps"] = self._planned


def _model_config(recipe: TrainingRecipe, tokenizer: Tokenizer) -> ModelConfig:
    eos = tokenizer.eos_token_id
    return recipe.model_config(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=() if eos is None else (eos,),
        pad_token_id=tokenizer.pad_token_id,
    )
