"""`llmserve bench serve` as a user runs it, and what it printed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmserve.cli import main

Captured = pytest.CaptureFixture[str]


def bench(url: str, *arguments: str) -> int:
    """Its exit code; prompts of 6 tokens, answers of 4, unless there is a set of them."""
    lengths = () if "--dataset-name" in arguments else ("--input-len", "6", "--output-len", "4")
    return main(["bench", "serve", "--base-url", url, *lengths, *arguments])


def last_json(capsys: Captured) -> dict[str, Any]:
    """The result that it printed."""
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result
