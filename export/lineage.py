"""`lineage.json`: what a folder was made from, stage by stage, as content hashes.

Each command that makes a folder from another copies the other's lineage and adds its own stage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmserve.strict_json import read_json

__all__ = ["LINEAGE_FILE", "extended_lineage"]

LINEAGE_FILE = "lineage.json"


def extended_lineage(source: Path, stage: str, entry: dict[str, Any]) -> bytes:
    """The lineage of `source` with one more stage, as a file's content.

    Raises `CheckpointError` if the lineage that lies in `source` is malformed.
    """
    path = source / LINEAGE_FILE
    lineage = read_json(path) if path.is_file() else {}
    lineage[stage] = entry
    return f"{json.dumps(lineage, indent=2)}\n".encode()
