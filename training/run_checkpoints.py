"""The checkpoints of a run: when one is the best, what it takes to write one, and going on."""

from __future__ import annotations

from llmserve.errors import TrainingError

from .checkpoints import load_checkpoint, save_checkpoint
from .distributed import shared_folder
from .recipe import TrainingRecipe
from .run_folder import RunFolder
from .trainer import Trainer

__all__ = ["RunCheckpoints"]


class RunCheckpoints:
    """Between a run's folder and its trainer. All processes call its methods together."""

    def __init__(self, folder: RunFolder, recipe: TrainingRecipe, trainer: Trainer) -> None:
        self._folder, self._recipe, self._trainer = folder, recipe, trainer
        self._held_out: tuple[int, float] | None = None

    def restore(self) -> bool:
        """Go on from the last checkpoint; whether there is one."""
        path = self._folder.last_checkpoint()
        if path is None:
            return False
        trainer = self._trainer
        trainer.state = load_checkpoint(
            path,
            trainer.model,
            trainer.optimizer,
            average=trainer.average,
            processes=trainer.processes,
        )
        state = trainer.state
        is_evaluated = state.step % self._recipe.evaluate_every == 0
        if (
            is_evaluated
            and state.best_held_out_loss is not None
            and not state.evaluations_since_best
        ):
            # A process that was killed just after it wrote the checkpoint had not said so.
            self._mark_if_best(state.step, state.best_held_out_loss)
        return True

    def take_held_out(self, step: int, loss: float) -> bool:
        """Remember the held-out loss after `step`; whether it is the lowest so far."""
        state = self._trainer.state
        self._held_out = (step, loss)
        is_best = state.best_held_out_loss is None or loss < state.best_held_out_loss
        if is_best:
            state.best_held_out_loss, state.evaluations_since_best = loss, 0
        else:
            state.evaluations_since_best += 1
        return is_best

    def is_time_to_stop(self) -> bool:
        """Whether more evaluations than the recipe allows have brought nothing."""
        patience = self._recipe.early_stop
        return patience is not None and self._trainer.state.evaluations_since_best >= patience

    def save(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            TrainingError: the weights are not finite; the last checkpoint stays.
            OSError: the disk is full; the last checkpoint stays.
        """
        trainer, recipe, step = self._trainer, self._recipe, self._trainer.state.step
        if not trainer.weights_are_finite():
            raise TrainingError(
                f"the weights are not finite after step {step}; the last checkpoint is kept. "
                "Try a lower learning_rate or precision float32"
            )

        with shared_folder(
            trainer.processes,
            lambda: self._folder.new_checkpoint(
                step, keep=recipe.keep_checkpoints, keep_every=recipe.keep_every
            ),
        ) as path:
            save_checkpoint(
                path,
                trainer.model,
                trainer.optimizer,
                trainer.state,
                tokenizer=self._folder.tokenizer,
                average=trainer.average,
                processes=trainer.processes,
            )
        if self._held_out is not None and self._held_out[0] == step:
            self._mark_if_best(*self._held_out)

    def _mark_if_best(self, step: int, held_out_loss: float) -> None:
        if self._trainer.processes.is_first:
            self._folder.mark_if_best(step, held_out_loss)
