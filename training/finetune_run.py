"""A fine-tuning from model folder and data to model folder: read, check, train, finish.

`run_finetuning` may be killed at any moment and called again: it goes on from the last checkpoint
and ends, in float32 and with the same number of threads, with the very weights that an undisturbed
run ends with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError, DataError, TrainingError
from llmserve.text.tokenizer import Tokenizer

from .finetune_data import SplitRows, make_examples, read_split
from .finetune_loop import FinetuneLoop
from .finetune_model import open_tuned
from .finetune_recipe import FinetuneRecipe
from .finetune_rows import rows_sha256
from .finetune_tasks import make_task
from .run_folder import RunFolder
from .run_loop import Reporter, RunOutcome
from .trainer import resolve_precision

__all__ = ["run_finetuning"]

_FORMAT = "llmserve-finetune-1"
_log = logging.getLogger("llmserve")


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
    folder = RunFolder(out)
    try:
        with folder.locked():
            checkpoint = Checkpoint.open(model)
            rows = read_split(recipe, data, held_out_data)
            record = _begin(folder, recipe, checkpoint, rows, restart=restart)
            result = folder.read_result()
            if result is not None and folder.model.is_dir():
                reporter.note("the run is finished already")
                return RunOutcome(folder.model, result)
            return _loop(folder, recipe, checkpoint, rows, record, reporter).run()
    except OSError as error:
        raise TrainingError(
            f"{out}: {error.strerror or error}; the last checkpoint is kept: run the same command "
            "again when this is mended"
        ) from error


def _loop(
    folder: RunFolder,
    recipe: FinetuneRecipe,
    checkpoint: Checkpoint,
    rows: SplitRows,
    record: dict[str, Any],
    reporter: Reporter,
) -> FinetuneLoop:
    tokenizer = Tokenizer.load(checkpoint.path)
    task = make_task(recipe, tokenizer, checkpoint.config.head, rows.all)
    limit = checkpoint.config.max_seq_len
    if recipe.max_tokens is not None:
        if recipe.max_tokens > limit:
            raise ConfigError(f"max_tokens is {recipe.max_tokens}; the model's context is {limit}")
        limit = recipe.max_tokens
    examples = make_examples(task, rows, recipe, limit)
    tuned = open_tuned(checkpoint, recipe, task.head)
    for note in examples.notes:
        reporter.note(note)
    return FinetuneLoop(folder, recipe, record, checkpoint, task, tuned, examples, reporter)


def _begin(
    folder: RunFolder,
    recipe: FinetuneRecipe,
    checkpoint: Checkpoint,
    rows: SplitRows,
    *,
    restart: bool,
) -> dict[str, Any]:
    """The run's record: as it was found, or new."""
    record = {
        "format": _FORMAT,
        "recipe": asdict(recipe),
        "model_fingerprint": checkpoint.fingerprint,
        "train_rows_sha256": rows_sha256(rows.train),
        "held_out_rows_sha256": rows_sha256(rows.held_out),
        "precision": resolve_precision(recipe.precision),
        "threads": recipe.threads or torch.get_num_threads(),
        "torch": torch.__version__,
    }
    begun = None if restart else folder.read_run()
    if begun is not None and (folder.last_checkpoint() or begun.get("format") != _FORMAT):
        _check_same(begun, record)
        return begun
    folder.clear()  # without a checkpoint there is nothing to lose
    folder.write_run(record)
    return record


def _check_same(begun: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise unless a run that began as `begun` can go on as `record`."""
    if begun.get("format") != _FORMAT:
        raise ConfigError(f"the folder holds no run of the format {_FORMAT}; give another --out")
    old, new = begun["recipe"], record["recipe"]
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        changes = ", ".join(f"{name} {old.get(name)!r} → {new[name]!r}" for name in changed)
        raise ConfigError(
            f"the folder holds a run of another recipe ({changes}); go on with the same recipe, "
            "give another --out, or --restart to begin anew"
        )
    for name, what in (
        ("model_fingerprint", "model"),
        ("train_rows_sha256", "data"),
        ("held_out_rows_sha256", "held-out data"),
    ):
        if begun[name] != record[name]:
            raise DataError(
                f"the folder holds a run on another {what}; give the same, another --out, or "
                "--restart to begin anew"
            )
    if begun["torch"] != record["torch"]:
        _log.warning(
            "the run began with torch %s; with %s its weights may differ in the last bits",
            begun["torch"],
            record["torch"],
        )
