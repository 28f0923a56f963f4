"""A fine-tuning from model folder and data to model folder: read, check, train, finish.

`run_finetuning` may be killed at any moment and called again: it goes on from the last checkpoint
and ends, in float32 and with the same number of threads, with the very weights that an undisturbed
run ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError, TrainingError
from llmserve.text.tokenizer import Tokenizer

from .finetune_data import Examples, SplitRows, make_examples, read_split
from .finetune_loop import FinetuneLoop
from .finetune_model import TunedModel, open_tuned
from .finetune_recipe import FinetuneRecipe
from .finetune_record import check_same, is_ours, make_record
from .finetune_task import Task
from .finetune_tasks import make_task
from .run_folder import RunFolder
from .run_loop import Reporter, RunOutcome

__all__ = ["run_finetuning"]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Everything that can be wrong with model and data has been found by now."""

    checkpoint: Checkpoint
    rows: SplitRows
    task: Task[Any]
    examples: Examples
    tuned: TunedModel


def run_finetuning(
    recipe: FinetuneRecipe,
    model: Path,
    data: Sequence[Path],
    out: Path,
    *,
    reporter: Reporter,
    held_out_data: Sequence[Path] = (),
    restart: bool = False,
) -> RunOutcome:
    """Fine-tune in the folder `out`, from its last checkpoint on if it has one.

    Args:
        recipe: What and how. A folder whose run has another recipe is refused.
        model: The model folder to begin with; it is not changed.
        data: Files of rows.
        out: The run's folder.
        reporter: Told of progress.
        held_out_data: Files of rows to evaluate on; none: a share of `data`.
        restart: Remove an earlier run of the folder first.

    Raises:
        ConfigError, DataError, CheckpointError: recipe, model, data or folder cannot be used.
        TrainingError: another process trains there, the disk is full, or the loss stays not
            finite. The last checkpoint is kept.
    """
    _check_places(model, out)
    folder = RunFolder(out)
    try:
        with folder.locked():
            prepared = _prepare(recipe, model, data, held_out_data)
            record = make_record(recipe, prepared.checkpoint, prepared.rows, prepared.task)
            record = _begin(folder, record, restart=restart)
            result = folder.read_result()
            if result is not None and folder.model.is_dir():
                reporter.note("the run is finished already")
                return RunOutcome(folder.model, result)
            for note in prepared.examples.notes:
                reporter.note(note)
            return FinetuneLoop(
                folder,
                recipe,
                record,
                prepared.checkpoint,
                prepared.task,
                prepared.tuned,
                prepared.examples,
                reporter,
            ).run()
    except OSError as error:
        raise TrainingError(
            f"{out}: {error.strerror or error}; the last checkpoint is kept: run the same command "
            "again when this is mended"
        ) from error


def _check_places(model: Path, out: Path) -> None:
    """A new run clears its folder; the model must not lie where that happens."""
    if model.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"the model {model} lies in the run's folder {out}; give another --out")


def _prepare(
    recipe: FinetuneRecipe, model: Path, data: Sequence[Path], held_out_data: Sequence[Path]
) -> _Prepared:
    checkpoint = Checkpoint.open(model)
    rows = read_split(recipe, data, held_out_data)
    task = make_task(recipe, Tokenizer.load(model), checkpoint.config.head, rows.all)
    limit = checkpoint.config.max_seq_len
    if recipe.max_tokens is not None:
        if recipe.max_tokens > limit:
            raise ConfigError(f"max_tokens is {recipe.max_tokens}; the model's context is {limit}")
        limit = recipe.max_tokens
    examples = make_examples(task, rows, recipe, limit)
    return _Prepared(checkpoint, rows, task, examples, open_tuned(checkpoint, recipe, task.head))


def _begin(folder: RunFolder, record: dict[str, Any], *, restart: bool) -> dict[str, Any]:
    """The run's record: as it was found, or new."""
    begun = None if restart else folder.read_run()
    if begun is not None and (folder.last_checkpoint() or not is_ours(begun)):
        check_same(begun, record)
        return begun
    folder.clear()  # without a checkpoint there is nothing to lose
    folder.write_run(record)
    return record
