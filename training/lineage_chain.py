"""Where the models of a lineage lie: a model's source by its digest, a run by its record."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from llmserve.lineage import LINEAGE_FILE
from llmserve.manifest import MANIFEST
from llmserve.strict_json import read_json

__all__ = ["find_source", "kind", "record_beside", "shown", "source_stages"]

_NUMBER = re.compile(r"-\d+$")


def kind(stage: str) -> str:
    """What a stage is, if it is the second or a later one of its kind."""
    return _NUMBER.sub("", stage)


def source_stages(folder: Path) -> list[tuple[str, str]]:
    """Name and source of the stages that made a folder from another, the last one at the end."""
    return [
        (name, str(entry["source"]))
        for name, entry in read_json(folder / LINEAGE_FILE).items()
        if isinstance(entry, dict) and "source" in entry
    ]


def find_source(folder: Path, fingerprint: object) -> Path | None:
    """The model near `folder` whose manifest has that hash, and that has a lineage."""
    places = [folder.parent.glob(f"*/{MANIFEST}"), folder.parent.glob(f"*/model/{MANIFEST}")]
    if record_beside(folder) is not None:
        places.append(folder.parent.parent.glob(f"*/model/{MANIFEST}"))
    for manifest in (path for place in places for path in sorted(place)):
        has_lineage = (manifest.parent / LINEAGE_FILE).is_file()
        if has_lineage and hashlib.sha256(manifest.read_bytes()).hexdigest() == fingerprint:
            return manifest.parent
    return None


def record_beside(folder: Path) -> Path | None:
    """The record of the run whose folder a model lies in."""
    path = folder.parent / "run.json"
    return path if path.is_file() else None


def shown(model: Path) -> str:
    """A model with its run's name, where it lies in a run's folder."""
    return model.name if record_beside(model) is None else f"{model.parent.name}/{model.name}"
