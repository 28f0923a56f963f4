"""`training_log.jsonl`: one JSON object a line, written while a run goes on.

Two kinds of lines (`monitor.py` says what is in them): of the steps since the line before, with
`loss`, and of an evaluation, with `held_out_loss`; both with `step`. A resumed run drops the lines
after the checkpoint that it goes on from, so that the log reads as if nothing had happened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from llmserve.durable import append_line, write_bytes

__all__ = ["TrainingLog", "read_log"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of the log at `path`; a torn last line, left by a crash, is not one of them."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


class TrainingLog:
    """A log open for appending; leaving its `with` block closes it."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Open the log at `path`, dropping lines about steps after `last_step`."""
        kept = [line for line in read_log(path) if line["step"] <= last_step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line. Values must be finite."""
        append_line(self._file, json.dumps(line, allow_nan=False))

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
