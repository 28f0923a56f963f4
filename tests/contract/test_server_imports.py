"""What serving costs before a model is loaded: the API process never imports torch, and neither
does the engine's before it knows its runner."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["lifecycle", "cli_serve", "engine_process"])
def test_torch_is_not_imported(module: str) -> None:
    code = (
        f"import sys, llmserve.server.{module}\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
