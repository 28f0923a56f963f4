"""The loop of a run: steps, with evaluations, log lines and checkpoints between them."""

from __future__ import annotations

import contextlib
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmserve.config import ModelConfig
from llmserve.model.transformer import Transformer
from llmserve.runners.freed_memory import keep_freed_memory
from llmserve.text.tokenizer import Tokenizer

from .batches import read_windows
from .data_windows import describe_windows, evaluate_text, open_windows
from .devices import device_of, training_device
from .distributed import ALONE, Processes
from .finish import finish_run
from .monitor import Monitor
from .monitor_diagnosis import RunFacts
from .monitor_flops import peak_flops, training_flops_per_token
from .monitor_repeats import repeated_share
from .monitor_units import dead_units
from .plan import StepPlanner
from .prepare import PreparedText
from .recipe import TrainingRecipe
from .run_checkpoints import RunCheckpoints
from .run_folder import RunFolder
from .stop_signals import StopSignals
from .trainer import Trainer

__all__ = ["Reporter", "RunLoop", "RunOutcome"]

_PROBE_WINDOWS = 8
"""Held-out windows that are looked at for dead units."""


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
        processes: Processes = ALONE,
    ) -> None:
        self._folder, self._recipe, self._record = folder, recipe, record
        self._text, self._reporter, self._processes = text, reporter, processes
        self._config = _model_config(recipe, text.tokenizer)
        model = Transformer(self._config, dropout=recipe.dropout)
        model.initialize(torch.Generator().manual_seed(recipe.seed))
        model.to(training_device(recipe.device, local_rank=processes.local_rank))
        self._windows = open_windows(text.train, recipe, end_id=text.tokenizer.eos_token_id)
        self._trainer = Trainer(
            model,
            recipe,
            self._windows,
            precision=record["precision"],
            threads=record["threads"],
            processes=processes,
        )
        self._checkpoints = RunCheckpoints(folder, recipe, self._trainer)
        if self._checkpoints.restore():
            record["planned_steps"] = self._planned
        self._planner = (
            StepPlanner(minutes=recipe.minutes, began=began)
            if recipe.minutes is not None and self._planned is None
            else None
        )
        self._monitor: Monitor | None = None
        self._logged_at = self._trainer.state.seconds

    @property
    def _step(self) -> int:
        return self._trainer.state.step

    @property
    def _planned(self) -> int | None:
        return self._trainer.state.planned_steps

    def run(self) -> RunOutcome:
        """Train to the end, or until a signal; then finish, or leave a checkpoint."""
        self._announce()
        keep_freed_memory()
        with ExitStack() as stack:
            if self._processes.is_first:
                self._monitor = stack.enter_context(self._make_monitor())
            stop = stack.enter_context(StopSignals())
            while not self._is_done():
                self._one_step()
                is_asked = stop.received or self._processes.is_left_alone * signal.SIGTERM
                received = self._processes.any(is_asked)
                if received:
                    self._checkpoints.save()
                    return RunOutcome(self._folder.model, None, received)
            self._checkpoints.save()
            self._say_findings()
        self._record["planned_steps"] = self._planned
        result = None
        if self._processes.is_first:
            result = finish_run(self._folder, self._recipe, self._record, self._text, self._trainer)
        self._processes.wait()
        return RunOutcome(self._folder.model, result or self._folder.read_result())

    def _make_monitor(self) -> Monitor:
        trainer, recipe = self._trainer, self._recipe
        facts = RunFacts(
            passes_per_step=trainer.tokens_per_step / trainer.tokens_per_epoch,
            repeated_share=repeated_share(self._text.train.ids),
            clip_norm=recipe.clip_norm,
        )
        peak = peak_flops(
            self._record["precision"], device_of(trainer.model), threads=self._record["threads"]
        )
        return Monitor(
            self._folder,
            facts,
            title=f"Training in {self._folder.path.name}",
            step=self._step,
            flops_per_token=training_flops_per_token(self._config),
            peak_flops=peak * self._processes.count,
        )

    def _announce(self) -> None:
        state, model = self._trainer.state, self._trainer.model
        count = sum(parameter.numel() for parameter in model.parameters())
        shared = f", {self._processes.count} processes" if self._processes.count > 1 else ""
        self._reporter.note(
            f"{count:,} parameters, vocabulary {self._config.vocab_size}, "
            f"{len(self._text.train.ids):,} tokens to train on, "
            f"{len(self._text.held_out.ids):,} held out, {self._record['precision']}, "
            f"{self._place()}{shared}"
        )
        self._reporter.note(describe_windows(self._windows))
        if state.step:
            self._reporter.note(f"going on from step {state.step}")

    def _place(self) -> str:
        device = device_of(self._trainer.model)
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"{self._record['threads']} threads"

    def _is_done(self) -> bool:
        return self._planned is not None and self._step >= self._planned

    def _one_step(self) -> None:
        is_logged = (self._step + 1) % self._recipe.log_every == 0
        result = self._trainer.run_step(measure_layers=is_logged)
        if result.is_skipped:
            self._reporter.note(f"step {self._step} skipped: loss or gradient is not finite")
        if self._monitor is not None:
            self._monitor.take(self._step, result)
        self._plan()
        if is_logged or self._is_done():
            self._write_log()
        is_best = self._step % self._recipe.evaluate_every == 0 and self._evaluate()
        is_due = self._step % self._recipe.checkpoint_every == 0
        # A run that may stop early ends with its best weights, so these are kept at once.
        if not self._is_done() and (is_due or (is_best and self._recipe.early_stop is not None)):
            self._checkpoints.save()

    def _plan(self) -> None:
        if self._planner is None:
            return
        planned = self._processes.any(self._planner.after_step(self._step) or 0)
        if not planned:
            return
        passes, tokens = self._recipe.max_passes, self._trainer.tokens_per_epoch
        if passes is not None:
            most = int(passes * tokens / self._trainer.tokens_per_step)
            planned = min(planned, max(self._step, most))
        self._trainer.state.planned_steps = planned
        self._planner = None
        # From here on the run is exact, so no step before must ever be made again.
        self._checkpoints.save()
        self._record["planned_steps"] = planned
        if self._processes.is_first:
            self._folder.write_run(self._record)
        limit = "" if passes is None else f", {passes:g} passes at most"
        self._reporter.note(f"{planned} steps planned for {self._recipe.minutes:g} minutes{limit}")

    def _write_log(self) -> None:
        counts = {
            layer: self._processes.sum(count)
            for layer, count in self._trainer.objective.routers.take_counts().items()
        }
        seconds = self._trainer.state.seconds - self._logged_at
        self._logged_at = self._trainer.state.seconds
        if self._monitor is None:
            return
        line = self._monitor.write_steps(
            self._step,
            tokens=self._trainer.tokens_per_step,
            seconds=seconds,
            counts=counts,
        )
        if line is not None:
            loss, speed = line["loss"], line["tokens_per_s"]
            self._reporter.progress(self._step, self._planned, loss=loss, tokens_per_s=speed)

    def _evaluate(self) -> bool:
        """Measure held-out text with the weights that would become the model; the lowest loss?"""
        average = self._trainer.average
        with contextlib.nullcontext() if average is None else average.swapped_in():
            loss = self._held_out_loss()
            dead = dead_units(self._trainer.model, self._probe())
        if self._monitor is not None:
            self._monitor.write_evaluation(self._step, loss, dead)
        self._reporter.note(f"step {self._step}: held-out loss {loss:.4f}")
        is_best = self._checkpoints.take_held_out(self._step, loss)
        if not is_best and self._checkpoints.is_time_to_stop():
            self._trainer.state.planned_steps = self._step
            self._reporter.note(
                f"no lower held-out loss in {self._recipe.early_stop} evaluations: the run ends"
            )
        return is_best

    def _held_out_loss(self) -> float:
        loss, _ = evaluate_text(
            self._trainer.model,
            self._text.held_out,
            self._recipe,
            end_id=self._text.tokenizer.eos_token_id,
            max_tokens=self._recipe.evaluation_tokens,
            loss_sum=self._trainer.loss_sum,
        )
        return loss

    def _probe(self) -> torch.Tensor:
        """Held-out windows, cut wherever they end."""
        ids = self._text.held_out.ids
        context = min(self._recipe.max_seq_len, len(ids) - 1)
        count = min(_PROBE_WINDOWS, (len(ids) - 1) // context)
        return read_windows(ids, [index * context for index in range(count)], context)[0]

    def _say_findings(self) -> None:
        if self._monitor is not None:
            for finding in self._monitor.write_page():
                self._reporter.note(f"{finding.kind}: {finding.text}")


def _model_config(recipe: TrainingRecipe, tokenizer: Tokenizer) -> ModelConfig:
    eos = tokenizer.eos_token_id
    return recipe.model_config(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=() if eos is None else (eos,),
        pad_token_id=tokenizer.pad_token_id,
    )
