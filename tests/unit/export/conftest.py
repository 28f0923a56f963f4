"""What the tests of all exporters share."""

from __future__ import annotations

import pytest


@pytest.fixture
def quick_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short text and no runner: for tests that export dozens of times to count file operations.
    Every file is written all the same."""
    windows = ("a short text", [[1, 2, 3]])
    for module in ("verify", "gguf_certificate"):
        monkeypatch.setattr(f"llmserve.export.{module}.reference_windows", lambda *_: windows)
    monkeypatch.setattr("llmserve.export.verify._served", lambda *_: ())
