"""Conversations from the files in which chat sets are published: what people asked, turn by turn.

The assistant's recorded replies are not sent. In a conversation of several turns the server's own
replies are its history (`load.py`), and where only single prompts are wanted the first turn is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from llmserve.errors import DataError

__all__ = ["CHAT_SETS", "read_conversations"]

Conversation = tuple[str, ...]
USERS = ("human", "user")


def read_conversations(path: Path, name: str) -> list[Conversation]:
    """The user's turns of every conversation in `path`, a set of the format `name`.

    A file is one JSON array, or an object on each line.

    Raises:
        DataError: the file cannot be read, holds no conversation, or an entry is not what it
            should be.
    """
    take = CHAT_SETS[name]
    found = []
    for place, entry in _entries(path):
        turns = take(entry) if isinstance(entry, dict) else None
        texts = [turn for turn in turns or () if isinstance(turn, str)]
        if turns is None or len(texts) < len(turns):
            raise DataError(f"{path}, {place}: expected {EXPECTED[name]}")
        if said := tuple(text for text in texts if text.strip()):
            found.append(said)
    if not found:
        raise DataError(f"{path} holds no conversation in which a user says something")
    return found


def _entries(path: Path) -> Iterator[tuple[str, object]]:
    """Each entry and where it stands."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the prompts in {path}: {error}") from error
    if data.lstrip()[:1] == b"[":
        yield from ((f"entry {n}", entry) for n, entry in enumerate(_parsed(path, "", data), 1))
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(path, f", line {number}", line)


def _parsed(path: Path, place: str, data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}{place}: {error}") from error


def _sharegpt(entry: dict[str, object]) -> list[object] | None:
    return _said(entry.get("conversations"), "from", "value")


def _messages(entry: dict[str, object]) -> list[object] | None:
    return _said(entry.get("messages"), "role", "content")


def _said(messages: object, speaker: str, text: str) -> list[object] | None:
    """What users say in a list of messages; None: it is no such list."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        return None
    return [one.get(text) for one in messages if one.get(speaker) in USERS]


def _mt_bench(entry: dict[str, object]) -> list[object] | None:
    turns = entry.get("turns")
    return turns if isinstance(turns, list) else None


def _gsm8k(entry: dict[str, object]) -> list[object] | None:
    return [entry.get("question")]


CHAT_SETS: dict[str, Callable[[dict[str, object]], list[object] | None]] = {
    "sharegpt": _sharegpt,
    "mt-bench": _mt_bench,
    "gsm8k": _gsm8k,
    "messages": _messages,
}
"""Format → what takes the user's turns from an entry."""

EXPECTED = {
    "sharegpt": 'an object with "conversations", a list of {"from", "value"} of text',
    "mt-bench": 'an object with "turns", a list of texts',
    "gsm8k": 'an object with "question", a text',
    "messages": 'an object with "messages", a list of {"role", "content"} of text',
}
