"""What a device does at most, measured on a CPU: the arithmetic of rates."""

from __future__ import annotations

import pytest
import torch

from llmserve.runners import torch_devices
from llmserve.runners.torch_devices import matrix_rate, memory_rate


@pytest.fixture(autouse=True)
def _half_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes half a second, but the first, which compiles."""
    ticks = iter([0.0, 9.0, *(half / 2 for half in range(20, 99))])
    monkeypatch.setattr(torch_devices.time, "perf_counter", lambda: next(ticks))


def test_a_product_of_matrices_is_their_size_cubed() -> None:
    assert matrix_rate("cpu", torch.float32, size=8) == 2 * 8**3


def test_a_copy_reads_and_writes() -> None:
    assert memory_rate("cpu", num_bytes=1024) == 2 * 2 * 1024
