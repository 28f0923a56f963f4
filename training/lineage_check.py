"""Holding a model's lineage against what is still there: the folder, its source, its run, its text.

Every stage is `verified` (computed anew, and the same), `changed` (computed anew, and another), or
`absent`: what it was computed from is not here, which is no fault. A model's source is looked for
among the folders beside it, its run in the folder that it lies in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llmserve.checkpoint import Checkpoint
from llmserve.durable import verify_manifest
from llmserve.errors import CheckpointError, DataError
from llmserve.manifest import MANIFEST
from llmserve.strict_json import read_json
from llmserve.text.tokenizer import Tokenizer

from .data_sources import file_sha256s
from .lineage import LINEAGE_FILE, json_sha256, weights_sha256
from .prepare import open_prepared, tokenizer_sha256

__all__ = ["Stage", "check_lineage"]

Status = Literal["verified", "changed", "absent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a lineage, checked."""

    name: str
    entry: Mapping[str, Any]
    """What lineage.json says of it."""
    status: Status
    detail: str
    """What it was compared with, or what is missing."""


def check_lineage(folder: Path, sources: Sequence[str] = ()) -> list[Stage]:
    """Check every stage of the lineage of a model folder, and the folder itself.

    Args:
        folder: A folder that a run, `quantize` or `export` made.
        sources: The text it was made from, if that is to be checked, too.

    Raises:
        CheckpointError: no lineage, or a damaged one.
        DataError: a source is missing.
    """
    path = folder / LINEAGE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {LINEAGE_FILE}: it was not made by a run that is finished, nor from "
            "the model of one"
        )
    lineage = read_json(path)
    checks = _Checks(folder, sources)
    stages = []
    for name, entry in lineage.items():
        if not isinstance(entry, dict) or not _has_good_files(entry):
            raise CheckpointError(f"{path}: {name} is no stage of a lineage")
        status, detail = checks.check(name, entry)
        stages.append(Stage(name=name, entry=entry, status=status, detail=detail))
    status, detail = checks.folder()
    return [*stages, Stage(name="folder", entry={}, status=status, detail=detail)]


def _has_good_files(entry: Mapping[str, Any]) -> bool:
    """Whether the files that a stage names, if it names any, have names and digests."""
    files = entry.get("files", [])
    return isinstance(files, list) and all(
        isinstance(file, dict)
        and isinstance(file.get("name"), str)
        and isinstance(file.get("sha256"), str)
        for file in files
    )


class _Checks:
    """Where the stages of one folder are compared with what."""

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self._folder = folder.absolute()
        self._sources = sources

    def check(self, name: str, entry: Mapping[str, Any]) -> tuple[Status, str]:
        known = {
            "data": self._data,
            "tokenizer": self._tokenizer,
            "config": self._config,
            "run": self._run,
            "checkpoint": self._checkpoint,
        }
        if "source" in entry:
            return self._source_stage(entry)
        if name not in known:
            return "absent", "a stage of a kind that is not known here"
        try:
            return known[name](entry)
        except (CheckpointError, DataError) as error:
            return "changed", str(error)

    def folder(self) -> tuple[Status, str]:
        if not (self._folder / MANIFEST).is_file():
            return "absent", f"no {MANIFEST}"
        try:
            verify_manifest(self._folder)
        except CheckpointError as error:
            return "changed", str(error)
        return "verified", f"every file as in {MANIFEST}"

    @cached_property
    def _origin(self) -> Path | None:
        """The folder that the run wrote: this one, or the first of the chain of sources."""
        folder: Path | None = self._folder
        while folder is not None:
            sources = [
                entry["source"]
                for entry in read_json(folder / LINEAGE_FILE).values()
                if isinstance(entry, dict) and "source" in entry
            ]
            if not sources:
                return folder
            folder = self._beside(sources[-1])
        return None

    def _beside(self, fingerprint: str) -> Path | None:
        """The folder beside this one whose manifest has that hash, and that has a lineage."""
        for manifest in sorted(self._folder.parent.glob(f"*/{MANIFEST}")):
            has_lineage = (manifest.parent / LINEAGE_FILE).is_file()
            if has_lineage and hashlib.sha256(manifest.read_bytes()).hexdigest() == fingerprint:
                return manifest.parent
        return None

    @property
    def _run_record(self) -> Path | None:
        path = self._folder.parent / "run.json"
        return path if path.is_file() else None

    def _source_stage(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        found = self._beside(str(entry["source"]))
        if found is None:
            return "absent", "no folder beside this one is its source"
        return "verified", f"made from {found.name}"

    def _data(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        if self._sources:
            return self._data_files(entry)
        if self._run_record is None:
            return "absent", "not in a run's folder; compare the text with --text"
        run = self._run_record.parent
        text = open_prepared(run / "tokenizer", run / "tokens")
        halves = text.train.text_sha256 + text.held_out.text_sha256
        digest = hashlib.sha256(halves.encode()).hexdigest()
        return _compared(digest, entry, f"the token files of {run.name}")

    def _data_files(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        given = file_sha256s(self._sources)
        missing = [file["name"] for file in entry.get("files", []) if file["sha256"] not in given]
        if missing:
            return "changed", f"of the files it was made from, not given or changed: {missing[:4]}"
        return "verified", f"{len(given)} files given"

    def _tokenizer(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        if not (self._folder / "tokenizer.json").is_file():
            return "absent", "no tokenizer.json"
        return _compared(tokenizer_sha256(Tokenizer.load(self._folder)), entry, "tokenizer.json")

    def _config(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        if self._origin is None:
            return "absent", "the model it was made from is not beside it"
        values = read_json(self._origin / "config.json")
        return _compared(json_sha256(values), entry, f"{self._origin.name}/config.json")

    def _run(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        if self._run_record is None:
            return "absent", "not in a run's folder"
        record = read_json(self._run_record)
        return _compared(json_sha256(record), entry, f"{self._run_record.parent.name}/run.json")

    def _checkpoint(self, entry: Mapping[str, Any]) -> tuple[Status, str]:
        if self._origin is None:
            return "absent", "the model it was made from is not beside it"
        checkpoint = Checkpoint.open(self._origin)
        weights = {name: checkpoint.float32(name) for name in checkpoint.names()}
        return _compared(weights_sha256(weights), entry, f"the weights of {self._origin.name}")


def _compared(digest: str, entry: Mapping[str, Any], where: str) -> tuple[Status, str]:
    if digest == entry.get("sha256"):
        return "verified", where
    return "changed", f"{where}: now {digest[:16]}"
