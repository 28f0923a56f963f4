"""Everything that a fine-tuning needs before its first step, checked: model, task and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.text.tokenizer import Tokenizer

from .finetune_data import Examples, SplitRows, make_examples, read_split
from .finetune_model import TunedModel, open_tuned
from .finetune_recipe import FinetuneRecipe
from .finetune_task import Task
from .finetune_tasks import make_task

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What can be wrong with recipe, model and data has been found by now."""

    recipe: FinetuneRecipe
    checkpoint: Checkpoint
    """The model folder to begin with."""
    rows: SplitRows
    task: Task[Any]
    examples: Examples
    tuned: TunedModel
    """The model with the task's head; changed by training."""


def prepare(
    recipe: FinetuneRecipe, model: Path, data: Sequence[Path], held_out_data: Sequence[Path]
) -> Prepared:
    """Open the model, read the rows, and turn them into examples.

    Raises:
        CheckpointError: the model's folder, or the teacher's, cannot be used.
        ConfigError: recipe and model do not go together.
        DataError: the rows cannot be used; one at fault is named by its place.
    """
    checkpoint = Checkpoint.open(model)
    rows = read_split(recipe, data, held_out_data)
    task = make_task(recipe, Tokenizer.load(model), checkpoint.config.head, rows.all)
    limit = checkpoint.config.max_seq_len
    if recipe.max_tokens is not None:
        if recipe.max_tokens > limit:
            raise ConfigError(f"max_tokens is {recipe.max_tokens}; the model's context is {limit}")
        limit = recipe.max_tokens
    examples = make_examples(task, rows, recipe, limit)
    tuned = open_tuned(checkpoint, recipe, task.head)
    return Prepared(
        recipe=recipe, checkpoint=checkpoint, rows=rows, task=task, examples=examples, tuned=tuned
    )
