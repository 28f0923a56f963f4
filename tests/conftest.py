"""Fixtures that every test may use: fixed seeds and threads, and the folder of shared real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Where a test has torch use two threads they would spin for each other, as `llmserve.cli` says.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when triton is imported, which packages of others do too: all kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(os.environ.get("LLMSERVE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real checkpoints and texts that are not part of the project; the test skips without them."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip(f"no real checkpoints at {SHARED}; point LLMSERVE_SHARED to them")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared_folder: Path) -> Path:
    """A real Llama checkpoint of 260K parameters, trained by others on TinyStories."""
    return shared_folder / "checkpoints" / "stories260K"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The same number of threads everywhere: sums depend on it, and small models are fastest so."""
    try:
        import torch
    except ImportError:
        return
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
