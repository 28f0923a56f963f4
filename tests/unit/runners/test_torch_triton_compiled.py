"""Every kernel is compiled to machine code for GPUs that are not there, as it would be launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import support
from llmserve import runners

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

SHARED_BYTES = {"80": 99 << 10, "90": 227 << 10}
"""Most shared memory of a program, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"). 8.0 has more, but 8.6 and 8.9 run the same code."""
SPILLED_BYTES = 256
"""Of a thread: what cost nothing to measure beside larger tiles. Those that do not fit take
thousands."""


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    script = Path(support.__path__[0]) / "kernel_compiler.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    running = {
        capability: subprocess.Popen(
            [sys.executable, "-W", "error", str(script), capability],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for capability in SHARED_BYTES
    }  # fmt: skip
    said = {capability: process.communicate() for capability, process in running.items()}
    for capability, (output, errors) in said.items():
        assert running[capability].returncode == 0, errors[-4000:]
        found = [json.loads(line) for line in output.splitlines()]
        assert {one["kernel"] for one in found} == kernels(), "a kernel is not launched"
        for one in found:
            assert one["shared_bytes"] <= SHARED_BYTES[capability], (capability, one)
            assert one["spilled_bytes"] <= SPILLED_BYTES, (capability, one)


def kernels() -> set[str]:
    """Names of those that are launched, from the sources."""
    folder = Path(runners.__path__[0])
    lines = (
        line
        for path in folder.glob("torch_triton_*.py")
        for line in path.read_text("utf-8").splitlines()
    )
    return {
        line.removeprefix("def ").split("(")[0]
        for line in lines
        if line.startswith("def _") and "_kernel(" in line
    }
