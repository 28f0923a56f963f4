"""R17, R18: whatever file operation an export fails or is killed at, no half of it appears."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve import failpoints
from llmserve.failpoints import FailpointError
from support.exports import EXPORTS, check_left, prepare_model, remove_all

NEEDS = {"nf4": "bitsandbytes", "bnb-int8": "bitsandbytes", "onnx": "onnxruntime"}
SOAK = [pytest.mark.soak, pytest.mark.timeout(1200)]
RAISED = {"gptq": 29, "gguf": 5, "dequantize": 7}
"""Quick exports, and every how many of their operations fail in the fast tests."""
KILLED = {"rtn": 17, "onnx": 29, "gguf": 17}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_model(tmp_path_factory.mktemp("run") / "model")


@pytest.mark.parametrize(("kind", "every"), RAISED.items())
@pytest.mark.usefixtures("quick_certificate")
def test_no_failed_operation_leaves_half_an_export(
    model: Path, tmp_path: Path, kind: str, every: int
) -> None:
    out = tmp_path / "out" / "export"
    out.parent.mkdir()
    failures = 0
    for turn in range(1, 10_000, every):
        remove_all(out)
        failpoints.arm(f"durable.op=raise@{turn}")
        try:
            EXPORTS[kind](model, out)
            break
        except FailpointError:
            failures += 1
        finally:
            failpoints.disarm_all()
        if not out.exists():
            left = {path.name for path in out.parent.iterdir()}
            assert left <= {f".{out.name}.partial"}, "something is left beside it"
        check_left(out)
    assert failures >= 20 // every
    assert out.exists()
    check_left(out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed at each operation")
@pytest.mark.parametrize(
    ("kind", "every"),
    [
        *KILLED.items(),
        *(pytest.param(kind, 7 if kind == "contract" else 1, marks=SOAK) for kind in EXPORTS),
    ],
)
def test_killed_export_leaves_nothing_or_what_verifies(
    model: Path, tmp_path: Path, kind: str, every: int
) -> None:
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    command = [
        sys.executable, "-m", "support.exports", kind, str(model), str(tmp_path / "out/export"),
        str(every),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
