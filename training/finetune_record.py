"""`run.json` of a fine-tuning: what determines it, compared when it goes on."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from typing import Any

import torch

from llmserve.errors import ConfigError, DataError

from .finetune_prepare import Prepared
from .finetune_recipe import FinetuneRecipe
from .finetune_rows import rows_sha256
from .objective import resolve_precision

__all__ = ["check_same", "is_ours", "make_record"]

_FORMAT = "llmserve-finetune-1"
_log = logging.getLogger("llmserve")


def make_record(prepared: Prepared) -> dict[str, Any]:
    """The record of a new run on this machine."""
    recipe, rows = prepared.recipe, prepared.rows
    return {
        "format": _FORMAT,
        "recipe": asdict(recipe),
        "model_fingerprint": prepared.checkpoint.fingerprint,
        "train_rows_sha256": rows_sha256(rows.train),
        "held_out_rows_sha256": rows_sha256(rows.held_out),
        "task_sha256": hashlib.sha256(prepared.task.inputs.encode()).hexdigest(),
        "precision": _precision(recipe),
        "threads": recipe.threads or torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _precision(recipe: FinetuneRecipe) -> str:
    """float16, which an older GPU would take, needs a scaled loss."""
    found = resolve_precision(recipe.precision, recipe.device)
    return "float32" if found == "float16" else found


def is_ours(record: dict[str, Any]) -> bool:
    """Whether a run's record is a fine-tuning's."""
    return record.get("format") == _FORMAT


def check_same(begun: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise unless a run that began as `begun` can go on as `record`.

    Raises:
        ConfigError: it was no fine-tuning, or began with another recipe.
        DataError: it began with another model, other data or another template or teacher.
    """
    if not is_ours(begun):
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
        ("task_sha256", "template or teacher"),
    ):
        if begun.get(name) != record[name]:
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
