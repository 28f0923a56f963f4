"""`run.json`: what determines a run, written when it begins and compared when it goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from llmserve.errors import ConfigError, DataError

from .data_sources import SourceFile
from .objective import resolve_precision
from .prepare import PreparedText, tokenizer_sha256
from .recipe import TrainingRecipe

__all__ = ["check_same_recipe", "check_same_text", "make_run"]

_FORMAT = "llmserve-run-2"
_log = logging.getLogger("llmserve")


def make_run(
    recipe: TrainingRecipe,
    text: PreparedText,
    *,
    corpus_sha256: str,
    files: Sequence[SourceFile],
    processes: int = 1,
) -> dict[str, Any]:
    """The record of a new run on this machine.

    Args:
        recipe: How.
        text: Its tokens.
        corpus_sha256: Digest of the cleaned text.
        files: Those that the text was read from.
        processes: How many share the run.
    """
    return {
        "format": _FORMAT,
        "recipe": asdict(recipe),
        "files": [asdict(file) for file in files],
        "text_sha256": corpus_sha256,
        "tokenizer_sha256": tokenizer_sha256(text.tokenizer),
        "train_tokens_sha256": text.train.sha256,
        "held_out_tokens_sha256": text.held_out.sha256,
        "precision": resolve_precision(recipe.precision, recipe.device),
        "threads": recipe.threads or torch.get_num_threads(),
        "processes": processes,
        "torch": torch.__version__,
        "planned_steps": recipe.steps,
    }


def check_same_recipe(run: dict[str, Any], recipe: TrainingRecipe, *, processes: int = 1) -> None:
    """Raise `ConfigError` unless `run` began with `recipe`.

    Warns if torch is another version or the number of processes another.
    """
    if run.get("format") != _FORMAT:
        raise ConfigError(
            f"the folder holds no run of the format {_FORMAT}; give another --out, or --restart to "
            "begin anew"
        )
    before, asked = run["recipe"], asdict(recipe)
    changed = [name for name in asked if before.get(name) != asked[name]]
    if changed:
        changes = ", ".join(f"{name} {before.get(name)!r} → {asked[name]!r}" for name in changed)
        raise ConfigError(
            f"the folder holds a run of another recipe ({changes}); go on with the same recipe, "
            "give another --out, or --restart to begin anew"
        )
    for what, begun, now in (
        ("torch", run["torch"], torch.__version__),
        ("processes:", run["processes"], processes),
    ):
        if begun != now:
            _log.warning(
                "the run began with %s %s; with %s its weights may differ in the last bits",
                what,
                begun,
                now,
            )


def check_same_text(run: dict[str, Any], corpus_sha256: str) -> None:
    """Raise `DataError` unless `run` began with that text."""
    if run["text_sha256"] != corpus_sha256:
        raise DataError(
            "the folder holds a run on another text; give the same --text, another --out, or "
            "--restart to begin anew"
        )
