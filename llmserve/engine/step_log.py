"""A run of an engine, written down line by line, so that it can be played again.

The file holds one JSON array a line, the first element naming what it is:

    ["engine", version, info, config, overlaps]   once, first
    ["add", request]   ["abort", id, reason]      what came in
    ["finish", id, choice]   ["fail", error]
    ["now", time]                                 a step begins
    ["work", [[uid, start, stop, drafts]...], [uid preempted...]]   what it decided
    ["drawn", ids, places of unusable rows]       what the runner drew

A sequence's uid is its number in order of creation. The log holds the prompts and answers as token
ids: it is as confidential as they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..durable import append_line
from ..errors import ConfigError, DataError
from ..runners.protocol import CacheGroup, RunnerInfo, StepResult
from ..sampling import SamplingParams
from .config import EngineConfig, SpeculationConfig, StepCost
from .grammar import Grammar, GrammarKind
from .request import FinishReason, Pooling, Request, Scoring
from .step import Step
from .watcher import Watcher

__all__ = ["LOG_VERSION", "StepLog", "drawn_record", "open_log", "parse_engine", "parse_request",
           "read_log", "work_record"]  # fmt: skip

LOG_VERSION = 1

Record = list[Any]


class StepLog(Watcher):
    """Writes what an engine does to an open text file. Close the file yourself."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def started(self, info: RunnerInfo, config: EngineConfig, *, overlaps: bool) -> None:
        """The header."""
        facts = [dataclasses.asdict(info), dataclasses.asdict(config), overlaps]
        self._write(["engine", LOG_VERSION, *facts])

    def added(self, request: Request) -> None:
        """A request, whole."""
        self._write(["add", dataclasses.asdict(request)])

    def aborted(self, request_id: str, reason: FinishReason) -> None:
        """The end of a request, asked for."""
        self._write(["abort", request_id, reason.value])

    def finished(self, request_id: str, choice_index: int) -> None:
        """A stop string."""
        self._write(["finish", request_id, choice_index])

    def failed(self, error: str) -> None:
        """A step given up."""
        self._write(["fail", error])

    def stepping(self, now: float) -> None:
        """The beginning of a step."""
        self._write(["now", now])

    def scheduled(self, step: Step) -> None:
        """A step's work."""
        self._write(work_record(step))

    def collected(self, result: StepResult) -> None:
        """A step's tokens."""
        self._write(drawn_record(result))

    def _write(self, record: Record) -> None:
        append_line(self._file, json.dumps(record, separators=(",", ":")))


def open_log(path: Path) -> TextIO:
    """The file for a log, emptied where there is one; a new one is readable by its owner alone.

    Raises:
        ConfigError: it cannot be written.
    """

    def private(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    try:
        return open(path, "w", encoding="utf-8", opener=private)
    except OSError as error:
        raise ConfigError(f"{path}: the step log cannot be written: {error.strerror}") from error


def work_record(step: Step) -> Record:
    """The line about a step's work."""
    is_ahead = step.fed_rows is not None
    ends = [len(sequence.token_ids) + is_ahead for sequence in step.decodes]
    work: list[Any] = [
        [sequence.uid, end - 1, end + step.num_rounds - 1, []]
        for sequence, end in zip(step.decodes, ends, strict=True)
    ]
    work += [[c.sequence.uid, c.start, c.stop, c.draft_ids] for c in step.chunks]
    return ["work", work, [sequence.uid for sequence in step.preempted]]


def drawn_record(result: StepResult) -> Record:
    """The line about a step's tokens."""
    bad = [] if result.is_finite is None else np.flatnonzero(~result.is_finite).tolist()
    return ["drawn", result.token_ids.tolist(), bad]


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log, lazily; a torn last line, left by a crash, is not one of them.

    Raises:
        DataError: the file cannot be read, or a line is no record.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    return
                yield _parse_line(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the log cannot be read: {error}") from error


def _parse_line(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: no record of a step log: {error}") from error
    if not isinstance(record, list) or not record or not isinstance(record[0], str):
        raise DataError(f"{path}, line {number}: no record of a step log")
    return record


def parse_engine(record: Record) -> tuple[RunnerInfo, EngineConfig, bool]:
    """Runner, settings and whether the runner overlapped, from a log's first record.

    Raises:
        DataError: it is of another kind or version, or holds what is no such setting.
    """
    if record[0] != "engine" or record[1] != LOG_VERSION:
        raise DataError(f"not a step log of version {LOG_VERSION}: it begins with {record[:2]}")
    try:
        info, config = dict(record[2]), dict(record[3])
        info["eos_token_ids"] = tuple(info["eos_token_ids"])
        info["adapters"] = tuple(info["adapters"])
        info["labels"] = tuple(info.get("labels", ()))
        info["cache_groups"] = tuple(CacheGroup(**group) for group in info["cache_groups"])
        config["num_blocks"] = tuple(config["num_blocks"])
        for name, kind in (
            ("speculation", SpeculationConfig),
            ("step_cost", StepCost),
            ("draft_cost", StepCost),
        ):
            if config[name] is not None:
                config[name] = kind(**config[name])
        return RunnerInfo(**info), EngineConfig(**config), bool(record[4])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"the step log's first line cannot be used: {error}") from error


def parse_request(values: Mapping[str, Any]) -> Request:
    """The request of an `add` record. Raises `DataError` where it is none."""
    try:
        params = dict(values["sampling_params"])
        params["logit_bias"] = {int(name): bias for name, bias in params["logit_bias"].items()}
        for name, value in params.items():
            if isinstance(value, list):
                params[name] = tuple(value)
        pooling, scoring = values["pooling"], values.get("scoring")
        grammar = values.get("grammar")
        if grammar is not None:
            grammar = Grammar(GrammarKind(grammar["kind"]), grammar["text"], grammar["param"])
        return Request(
            **{
                **values,
                "sampling_params": SamplingParams(**params),
                "pooling": None if pooling is None else Pooling(pooling),
                "scoring": None if scoring is None else Scoring(scoring),
                "grammar": grammar,
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a request of the step log cannot be used: {error}") from error
