"""What serving costs before a model is loaded: the API process never imports torch, and neither
does the engine's before it knows its runner; the engine's process is started before anything that
takes long is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lifecycle", {"torch", "transformers"}),
        ("engine_loader", {"torch", "transformers", "fastapi", "tokenizers", "uvicorn"}),
        ("cli_serve", {"torch", "fastapi", "msgspec", "numpy", "uvicorn"}),
        ("engine_options", {"torch", "fastapi", "msgspec", "numpy", "uvicorn"}),
        ("messages", {"torch", "fastapi", "starlette"}),
        ("settings", {"torch", "fastapi", "starlette"}),
    ],
)
def test_what_takes_long_is_not_imported(module: str, absent: set[str]) -> None:
    code = f"import sys, llmserve.server.{module}\nassert not {absent!r} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
