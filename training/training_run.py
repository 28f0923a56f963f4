"""A run from text to model folder: prepare, train with evaluations and checkpoints, finish.

`run_training` may be killed at any moment and called again: it goes on from the last checkpoint
and ends, in float32 and with the same number of threads, with the very weights that an undisturbed
run ends with. With `minutes` this holds once the first steps have been timed: the plan is part of
the checkpoint that is made then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmserve.durable import write_json
from llmserve.errors import ConfigError

from .corpus import Corpus, read_corpus
from .devices import training_device
from .distributed import ALONE, Processes
from .prepare import PreparedText, open_prepared, prepare_text
from .recipe import TrainingRecipe
from .run_folder import RunFolder
from .run_loop import Reporter, RunLoop, RunOutcome
from .run_record import check_same_recipe, check_same_text, make_run

__all__ = ["run_training"]


def run_training(
    recipe: TrainingRecipe,
    sources: Sequence[str],
    out: Path,
    *,
    reporter: Reporter,
    restart: bool = False,
    processes: Processes = ALONE,
) -> RunOutcome:
    """Train in the folder `out`, from its last checkpoint on if it has one.

    Args:
        recipe: How. A folder whose run has another recipe is refused.
        sources: The text (`corpus.read_corpus`); may be empty where a run goes on.
        out: The run's folder.
        reporter: Told of progress.
        restart: Remove an earlier run of the folder first.
        processes: Who shares the run; each calls this with the same arguments. The first one
            prepares and writes what there is one of.

    Raises:
        ConfigError, DataError, CheckpointError: recipe, device, text or folder cannot be used.
        TrainingError: another process trains there, the disk is full, or the loss stays not
            finite. The last checkpoint is kept.
    """
    began = time.monotonic()
    training_device(recipe.device, local_rank=processes.local_rank)  # found missing before the text
    folder = RunFolder(out)
    try:
        with folder.locked() if processes.is_first else contextlib.nullcontext():
            if processes.is_first:
                corpus = _read_corpus(recipe, sources) if sources else None
                record, text = _begin(
                    folder, recipe, corpus, reporter, restart=restart, processes=processes
                )
                processes.wait()
            else:
                processes.wait()
                record, text = _join(folder)
            result = folder.read_result()
            is_finished = result is not None and folder.model.is_dir()
            if processes.any(processes.is_first and is_finished):
                reporter.note("the run is finished already")
                return RunOutcome(folder.model, result)
            return RunLoop(folder, recipe, record, text, reporter, began, processes).run()
    except OSError as error:
        raise folder.failure(error) from error


def _read_corpus(recipe: TrainingRecipe, sources: Sequence[str]) -> Corpus:
    return read_corpus(
        sources,
        separator=recipe.separator,
        text_field=recipe.text_field,
        cleaning=recipe.cleaning,
        held_out=recipe.held_out,
        held_out_by=recipe.held_out_by,
        seed=recipe.seed,
    )


def _begin(
    folder: RunFolder,
    recipe: TrainingRecipe,
    corpus: Corpus | None,
    reporter: Reporter,
    *,
    restart: bool,
    processes: Processes,
) -> tuple[dict[str, Any], PreparedText]:
    """The run's record and text: as they were found, or new."""
    record = None if restart else folder.read_run()
    if record is not None and (folder.last_checkpoint() is not None or corpus is None):
        check_same_recipe(record, recipe, processes=processes.count)
        if corpus is not None:
            check_same_text(record, corpus.sha256)
        return record, open_prepared(folder.tokenizer, folder.tokens)
    if corpus is None:
        raise ConfigError(f"{folder.path}: a new run needs text; give it with --text")
    folder.clear()  # without a checkpoint there is nothing to lose
    reporter.note(corpus.cleaning.summary())
    write_json(folder.cleaning, corpus.cleaning.as_json())
    reporter.note("preparing the tokenizer and the tokens")
    text = prepare_text(
        corpus, recipe, tokenizer_folder=folder.tokenizer, tokens_folder=folder.tokens
    )
    record = make_run(
        recipe,
        text,
        corpus_sha256=corpus.sha256,
        files=corpus.files,
        processes=processes.count,
    )
    folder.write_run(record)
    return record, text


def _join(folder: RunFolder) -> tuple[dict[str, Any], PreparedText]:
    """Record and text as the first process left them."""
    record = folder.read_run()
    assert record is not None, "the first process writes it before the others read it"
    return record, open_prepared(folder.tokenizer, folder.tokens)
