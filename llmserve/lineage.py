"""`lineage.json`: what a model folder was made from, stage by stage, as content hashes.

Each command that makes a folder from another copies the other's lineage and adds its own stage,
which names the other by the hash of its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .strict_json import read_json

__all__ = ["LINEAGE_FILE", "TRAINING_LOG", "extended_lineage", "history_files"]

LINEAGE_FILE = "lineage.json"
TRAINING_LOG = "training_log.jsonl"
"""How the training went that the weights come from, line by line."""


def history_files(source: Path, stage: str, entry: Mapping[str, Any]) -> dict[str, bytes]:
    """What a folder made from the folder `source` tells of its past: the lineage with one more
    stage, and the log of the training, if there is one.

    Raises `CheckpointError` for a malformed lineage in `source`.
    """
    files = {LINEAGE_FILE: extended_lineage(source, stage, entry)}
    log = source / TRAINING_LOG
    return files | ({TRAINING_LOG: log.read_bytes()} if log.is_file() else {})


def extended_lineage(source: Path, stage: str, entry: Mapping[str, Any]) -> bytes:
    """The lineage of the folder `source` with one more stage, as a file's content.

    A stage that was gone through before is kept; the new one is then called `stage-2` and so on.

    Raises:
        CheckpointError: the lineage that lies in `source` is malformed.
    """
    path = source / LINEAGE_FILE
    lineage = read_json(path) if path.is_file() else {}
    lineage[_free_name(stage, lineage)] = dict(entry)
    return f"{json.dumps(lineage, indent=2)}\n".encode()


def _free_name(stage: str, lineage: Mapping[str, Any]) -> str:
    if stage not in lineage:
        return stage
    number = 2
    while f"{stage}-{number}" in lineage:
        number += 1
    return f"{stage}-{number}"
