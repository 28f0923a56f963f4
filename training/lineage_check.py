"""Holding a model's lineage against what is still there: the folder, its source, its run, its text.

Every stage is `verified` (computed anew, and the same), `changed` (computed anew, and another), or
`absent`: what it was computed from is not here, which is no fault. A model's source is looked for
among the folders beside it and the models of runs beside it or beside its own run, the run in the
folder that the model lies in.
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
from llmserve.lineage import LINEAGE_FILE
from llmserve.manifest import MANIFEST
from llmserve.strict_json import read_json
from llmserve.text.tokenizer import Tokenizer

from .data_sources import file_sha256s
from .lineage import json_sha256, weights_sha256
from .lineage_chain import find_source, kind, record_beside, shown, source_stages
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
        folder: A folder that a run or a fine-tuning left, or a command made from one.
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
        try:
            if kind(name) == "finetune":
                return self._finetune(name, entry)
            if "source" in entry:
                return self._source_stage(name, entry)
            if name not in known:
                return "absent", "a stage of a kind that is not known here"
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
    def _chain(self) -> dict[str, Path]:
        """By stage, the folder that it made: this one, its source, and so on as far as they are.

        The run's own model stands under "run".
        """
        chain: dict[str, Path] = {}
        folder: Path | None = self._folder
        while folder is not None:
            stages = source_stages(folder)
            if not stages:
                chain["run"] = folder
                break
            name, source = stages[-1]
            chain[name] = folder
            folder = find_source(folder, source)
        return chain

    @property
    def _origin(self) -> Path | None:
        """The folder that the run wrote."""
        return self._chain.get("run")

    @property
    def _run_record(self) -> Path | None:
        """The record of the run, not of a fine-tuning after it."""
        is_tuned = any(kind(name) == "finetune" for name, _ in source_stages(self._folder))
        home = self._origin or (None if is_tuned else self._folder)
        return None if home is None else record_beside(home)

    def _source_stage(self, name: str, entry: Mapping[str, Any]) -> tuple[Status, str]:
        made = self._chain.get(name)
        found = None if made is None else find_source(made, entry["source"])
        if found is None:
            return "absent", "no folder beside this one is its source"
        return "verified", f"made from {found.name}"

    def _finetune(self, name: str, entry: Mapping[str, Any]) -> tuple[Status, str]:
        made = self._chain.get(name)
        if made is None:
            return "absent", "the model that it made is not beside this one"
        record = record_beside(made)
        if record is not None and json_sha256(read_json(record)) != entry.get("run"):
            return "changed", f"{record.parent.name}/run.json is another"
        found = find_source(made, entry.get("source"))
        source = "" if found is None else f", made from {shown(found)}"
        return _compared(_weights_sha256(made), entry, f"the weights of {shown(made)}{source}")

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
        return _compared(
            _weights_sha256(self._origin), entry, f"the weights of {self._origin.name}"
        )


def _weights_sha256(folder: Path) -> str:
    checkpoint = Checkpoint.open(folder)
    return weights_sha256((name, checkpoint.float32(name)) for name in sorted(checkpoint.names()))


def _compared(digest: str, entry: Mapping[str, Any], where: str) -> tuple[Status, str]:
    if digest == entry.get("sha256"):
        return "verified", where
    return "changed", f"{where}: now {digest[:16]}"
