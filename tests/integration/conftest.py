"""What holds for every test of whole commands."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients send the key of the environment where there is one: here only if a test sets it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
