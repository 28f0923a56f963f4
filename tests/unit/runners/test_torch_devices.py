"""Which devices there are, and the arithmetic of their rates."""

from __future__ import annotations

import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.runners import torch_devices
from llmserve.runners.torch_devices import checked_device, matrix_rate, memory_rate


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device must be cpu, cuda or cuda:N, got 'tpu'"),
        ("meta", "device must be cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:2", "device cuda:2: torch finds 2 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        checked_device(name)
    assert checked_device("cuda:1").index == 1


@pytest.fixture
def _half_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes half a second, but the first, which compiles."""
    ticks = iter([0.0, 9.0, *(half / 2 for half in range(20, 99))])
    monkeypatch.setattr(torch_devices.time, "perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("_half_seconds")
def test_a_product_of_matrices_is_their_size_cubed() -> None:
    assert matrix_rate("cpu", torch.float32, size=8) == 2 * 8**3


@pytest.mark.usefixtures("_half_seconds")
def test_a_copy_reads_and_writes() -> None:
    assert memory_rate("cpu", num_bytes=1024) == 2 * 2 * 1024
