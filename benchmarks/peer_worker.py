"""The child's side of an offline comparison: a loaded engine that measures when it is told to.

Runs in the interpreter of the engine that it measures, often another than llmserve's, so nothing
but the standard library is imported here. Requests and answers are one JSON object a line. What a
library prints goes to stderr: the answers have a copy of stdout for themselves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Protocol, TextIO

__all__ = ["TimedEngine", "run_worker", "versions_of"]

Prompts = list[list[int]]


class TimedEngine(Protocol):
    """A model in an engine, timed from inside."""

    def describe(self) -> dict[str, Any]:
        """`engine`, `weights` (scheme and head), `cache` and `versions`."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""

    def decode(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds of `num_tokens` steps that give each prompt, computed before, one token each."""


def run_worker(load: Callable[[], TimedEngine]) -> None:
    """Load the engine, say what it is, and answer requests until stdin ends."""
    with _own_stdout() as replies:
        engine = load()
        _send(replies, engine.describe())
        for line in sys.stdin:
            _send(replies, _answer(engine, json.loads(line)))


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions, by package."""
    return {package: version(package) for package in packages}


def _answer(engine: TimedEngine, request: dict[str, Any]) -> dict[str, Any]:
    prompts: Prompts = request["prompts"]
    try:
        if request["task"] == "prefill":
            return {"seconds": engine.prefill(prompts[0])}
        return {"seconds": engine.decode(prompts, request["num_tokens"])}
    except Exception as error:  # whatever a peer raises is told and ends the comparison there
        return {"error": f"{type(error).__name__}: {error}"}


def _own_stdout() -> TextIO:
    """A copy of stdout for answers; file descriptor 1 becomes stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
