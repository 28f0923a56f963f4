"""The loop of a fine-tuning: steps, with evaluations, log lines and checkpoints between them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from llmserve.errors import TrainingError

from .finetune_checkpoints import load_tuned, save_tuned
from .finetune_finish import finish_finetuning
from .finetune_prepare import Prepared
from .finetune_trainer import FinetuneTrainer, TuningStep
from .log import TrainingLog, read_log
from .run_folder import RunFolder
from .run_loop import Reporter, RunOutcome
from .stop_signals import StopSignals

__all__ = ["FinetuneLoop"]


class FinetuneLoop:
    """One process's part of a run."""

    def __init__(
        self, folder: RunFolder, prepared: Prepared, record: dict[str, Any], reporter: Reporter
    ) -> None:
        self._folder, self._record, self._reporter = folder, record, reporter
        self._recipe, tuned, task = prepared.recipe, prepared.tuned, prepared.task
        # The reference of preferences is the model as it is now, before a checkpoint is loaded.
        self._examples = replace(
            prepared.examples,
            train=task.prepare(tuned, prepared.examples.train),
            held_out=task.prepare(tuned, prepared.examples.held_out),
        )
        self._prepared = replace(prepared, examples=self._examples)
        self._trainer = FinetuneTrainer(
            tuned,
            task,
            self._examples.train,
            self._recipe,
            precision=record["precision"],
            threads=record["threads"],
        )
        self._restore()
        self._log = TrainingLog(folder.log, last_step=self._step)
        self._every = self._recipe.evaluate_every or self._trainer.steps_per_epoch

    @property
    def _step(self) -> int:
        return self._trainer.state.step

    @property
    def _planned(self) -> int:
        return self._trainer.state.planned_steps or 0

    def run(self) -> RunOutcome:
        """Train to the end, or until a signal; then finish, or leave a checkpoint."""
        self._announce()
        with self._log, StopSignals() as stop:
            if self._step == 0:
                self._evaluate_before()
            while self._step < self._planned:
                self._one_step()
                if stop.received is not None:
                    self._checkpoint()
                    return RunOutcome(self._folder.model, None, stop.received)
        result = finish_finetuning(
            self._folder, self._prepared, self._record, self._trainer, self._reporter
        )
        return RunOutcome(self._folder.model, result)

    def _announce(self) -> None:
        tuned, examples = self._trainer.tuned, self._examples
        trained = sum(parameter.numel() for parameter in self._trainer.trainable.values())
        self._reporter.note(
            f"{self._recipe.task}, {self._recipe.method}: {trained:,} weights trained, "
            f"{len(examples.train):,} rows to train on, {len(examples.held_out):,} held out, "
            f"{self._planned} steps, {self._record['precision']}, "
            f"{self._record['threads']} threads"
        )
        if tuned.frozen:
            self._reporter.note(f"{len(tuned.frozen)} layers stay quantized")
        if self._step:
            self._reporter.note(f"going on from step {self._step}")

    def _evaluate_before(self) -> None:
        """The figures that the tuned model's are compared with."""
        if not self._examples.held_out:
            return
        loss = self._evaluate()
        figures = self._trainer.figures(self._examples.held_out)
        self._record["before"] = {"held_out_loss": _or_none(loss), **figures}
        self._folder.write_run(self._record)

    def _one_step(self) -> None:
        step = self._trainer.run_step()
        if step.is_skipped:
            self._reporter.note(f"step {self._step} skipped: loss or gradient is not finite")
        else:
            self._write_log(step)
        is_last = self._step == self._planned
        loss = math.nan
        is_evaluated = bool(self._examples.held_out) and (is_last or self._step % self._every == 0)
        if is_evaluated:
            loss = self._evaluate()
        if is_last or is_evaluated or self._step % self._recipe.checkpoint_every == 0:
            self._checkpoint()
        if math.isfinite(loss):
            self._folder.mark_if_best(self._step, loss)

    def _restore(self) -> None:
        last = self._folder.last_checkpoint()
        if last is None:
            return
        trainer = self._trainer
        trainer.state = load_tuned(last, trainer.trainable, trainer.optimizer)
        # A kill may have come between the checkpoint and the note that it is the best.
        for line in read_log(self._folder.log):
            if line["step"] == self._step and "held_out_loss" in line:
                self._folder.mark_if_best(self._step, line["held_out_loss"])

    def _write_log(self, step: TuningStep) -> None:
        speed = step.num_tokens / step.seconds
        self._log.write(
            {
                "step": self._step,
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "grad_norm": step.grad_norm,
                "tokens_per_s": speed,
            }
        )
        self._reporter.progress(self._step, self._planned, loss=step.loss, tokens_per_s=speed)

    def _evaluate(self) -> float:
        loss = self._trainer.held_out_loss(self._examples.held_out)
        if math.isfinite(loss):
            self._log.write({"step": self._step, "held_out_loss": loss})
        self._reporter.note(f"step {self._step}: held-out loss {loss:.4f}")
        return loss

    def _checkpoint(self) -> None:
        trainer = self._trainer
        if not trainer.weights_are_finite():
            raise TrainingError(
                f"the weights are not finite after step {self._step}; the last checkpoint is kept. "
                "Try a lower learning_rate or precision float32"
            )
        with self._folder.new_checkpoint(self._step, keep=self._recipe.keep_checkpoints) as path:
            save_tuned(path, trainer.trainable, trainer.optimizer, trainer.state)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
