"""A fine-tuning from model folder and data to model folder: read, check, train, finish.

`run_finetuning` may be killed at any moment and called again: it goes on from the last checkpoint
and ends, in float32 and with the same number of threads, with the very weights that an undisturbed
run ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError

from .finetune_loop import FinetuneLoop
from .finetune_prepare import prepare
from .finetune_recipe import FinetuneRecipe
from .finetune_record import check_same, is_ours, make_record
from .run_folder import RunFolder
from .run_loop import Reporter, RunOutcome

__all__ = ["run_finetuning"]


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
            prepared = prepare(recipe, model, data, held_out_data)
            record = _begin(folder, make_record(prepared), restart=restart)
            result = folder.read_result()
            if result is not None and folder.model.is_dir():
                reporter.note("the run is finished already")
                return RunOutcome(folder.model, result)
            for note in prepared.examples.notes:
                reporter.note(note)
            return FinetuneLoop(folder, prepared, record, reporter).run()
    except OSError as error:
        raise folder.failure(error) from error


def _check_places(model: Path, out: Path) -> None:
    """A new run clears its folder; the model must not lie where that happens."""
    if model.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"the model {model} lies in the run's folder {out}; give another --out")


def _begin(folder: RunFolder, record: dict[str, Any], *, restart: bool) -> dict[str, Any]:
    """The run's record: as it was found, or new."""
    begun = None if restart else folder.read_run()
    if begun is not None and (folder.last_checkpoint() or not is_ours(begun)):
        check_same(begun, record)
        return begun
    folder.clear()  # without a checkpoint there is nothing to lose
    folder.write_run(record)
    return record
