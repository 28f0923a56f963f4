"""Files of recorded traffic, line by line: what a line says, and whether it can be true.

`azure`: the CSV of the Azure LLM inference traces (Patel et al. 2024, arXiv:2311.18677, section
III), a header and then time, tokens in, tokens out. `mooncake`: the JSON lines of the Mooncake
traces (Qin et al. 2025, FAST '25, section 6), which also name each block of 512 prompt tokens:
equal names mean that the block and all before it are equal. A line of it may say `priority` and
`tenant` too; other keys are passed over.

Readers are generators and hold one line at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import orjson

from llmserve.errors import DataError

__all__ = ["MOONCAKE_BLOCK_SIZE", "TraceFormat", "TraceRequest", "detect_format", "read_requests"]

TraceFormat = Literal["azure", "mooncake"]

MOONCAKE_BLOCK_SIZE = 512
"""Prompt tokens behind one of a Mooncake trace's hashes."""

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
MAX_KEY = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace."""

    line: int
    """Where it stands in the file, from 1."""
    arrival_s: float
    """Seconds after the trace's first request."""
    input_len: int
    """Tokens of the prompt, at least 1."""
    output_len: int
    """Tokens of the answer, at least 1."""
    block_keys: list[int] | None = None
    """Names of the prompt's blocks, the last of which may be partial; None: the trace has none."""
    priority: int | None = None
    """Lower goes first; None: the trace does not say."""
    tenant: str | None = None
    """Whose request it is; None: the trace does not say."""


def detect_format(path: Path) -> TraceFormat:
    """The format that the first line shows.

    Raises:
        DataError: the file cannot be read, or begins like neither format.
    """
    first = next(_lines(path), (1, ""))[1]
    if first.startswith("{"):
        return "mooncake"
    if first == AZURE_HEADER:
        return "azure"
    raise DataError(
        f"{path}, line 1: a trace begins with {AZURE_HEADER} (azure) or with a JSON object "
        f"(mooncake), got {first[:80]!r}"
    )


def read_requests(path: Path, trace_format: TraceFormat) -> Iterator[TraceRequest]:
    """The requests of a file in its order, which must be that of their arrival.

    Raises:
        DataError: the file cannot be read, or a line cannot be used; the message names both.
    """
    parse = {"azure": _azure_request, "mooncake": _mooncake_request}[trace_format]
    lines = _lines(path)
    if trace_format == "azure":
        _skip_header(path, lines)
    origin_s = last_s = None
    for number, line in lines:
        if not line.strip():
            continue
        try:
            request = parse(number, line)
            if last_s is not None and request.arrival_s < last_s:
                raise ValueError("it came before the line above it: sort the trace by time")
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        last_s = request.arrival_s
        origin_s = last_s if origin_s is None else origin_s
        yield replace(request, arrival_s=last_s - origin_s)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the trace {path}: {error}") from error


def _skip_header(path: Path, lines: Iterator[tuple[int, str]]) -> None:
    header = next(lines, (1, ""))[1]
    if header != AZURE_HEADER:
        raise DataError(
            f"{path}, line 1: an azure trace begins with {AZURE_HEADER}, got {header[:80]!r}"
        )


def _azure_request(number: int, line: str) -> TraceRequest:
    """Here and below `arrival_s` counts from wherever the file's own clock does."""
    cells = line.split(",")
    if len(cells) != 3:
        raise ValueError(f"expected three cells, {AZURE_HEADER}, got {len(cells)}")
    try:
        # Without a zone it is taken as UTC; only differences are used.
        time = datetime.fromisoformat(cells[0])
    except ValueError:
        raise ValueError(f"expected a time like 2023-11-16 18:15:46.68, got {cells[0]!r}") from None
    return TraceRequest(
        line=number,
        arrival_s=(time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp(),
        input_len=_whole("ContextTokens", _number(cells[1]), 1),
        output_len=_whole("GeneratedTokens", _number(cells[2]), 1),
    )


def _number(cell: str) -> int | str:
    return int(cell) if cell.isascii() and cell.isdigit() else cell


def _mooncake_request(number: int, line: str) -> TraceRequest:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    if missing := sorted({"timestamp", "input_length", "output_length", "hash_ids"} - row.keys()):
        raise ValueError(f"the object lacks {', '.join(missing)}")
    time_ms, priority, tenant = row["timestamp"], row.get("priority"), row.get("tenant")
    if isinstance(time_ms, bool) or not isinstance(time_ms, int | float):
        raise ValueError(f"timestamp must be a number of milliseconds, got {time_ms!r}")
    if tenant is not None and not isinstance(tenant, str):
        raise ValueError(f"tenant must be a string, got {tenant!r}")
    input_len = _whole("input_length", row["input_length"], 1)
    return TraceRequest(
        line=number,
        arrival_s=time_ms / 1000.0,
        input_len=input_len,
        output_len=_whole("output_length", row["output_length"], 1),
        block_keys=_block_keys(row["hash_ids"], input_len),
        priority=None if priority is None else _whole("priority", priority, -MAX_KEY),
        tenant=tenant,
    )


def _block_keys(value: object, input_len: int) -> list[int]:
    wanted = -(-input_len // MOONCAKE_BLOCK_SIZE)
    if not isinstance(value, list) or len(value) != wanted:
        raise ValueError(
            f"hash_ids must name the prompt's {wanted} blocks of {MOONCAKE_BLOCK_SIZE} tokens"
        )
    return [_whole("hash_ids", key, 0) for key in value]


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MAX_KEY:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value
