"""What a prefill needs at least."""

from __future__ import annotations

import pytest

from llmserve.benchmarks import latency_limits
from llmserve.benchmarks.latency_limits import DeviceLimits, limits_of, prefill_multiply_adds
from llmserve.benchmarks.shapes import SHAPES
from support.variants import QWEN2_MOE


def test_a_prompt_meets_all_weights_and_the_head_once() -> None:
    config = SHAPES["S"]
    block = 4 * 288 * 288 + 3 * 288 * 768
    attention = 2 * 6 * 288 * (10 * 11 // 2)
    expected = 10 * 6 * block + 32_000 * 288 + attention
    assert prefill_multiply_adds(config, 10) == expected


def test_experts_are_not_counted() -> None:
    assert prefill_multiply_adds(QWEN2_MOE, 10) is None


def test_a_gpu_is_measured_in_the_type_of_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmserve.runners import torch_devices

    monkeypatch.setattr(torch_devices, "memory_rate", lambda device: float(len(device)))
    monkeypatch.setattr(torch_devices, "matrix_rate", lambda device, dtype: float(dtype.itemsize))
    assert limits_of("cuda:1", "bfloat16") == DeviceLimits(read_bytes=6.0, multiply_adds=2.0)


def test_a_cpu_has_its_memory_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rate:
        def take(self) -> float:
            return 5.0

    monkeypatch.setattr(latency_limits, "MemoryRate", Rate)
    assert limits_of("cpu", "float32") == DeviceLimits(read_bytes=5.0)
