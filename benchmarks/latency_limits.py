"""How near prefills and decode steps come to what the device does at most (the roofline model).

A decode step reads the weights that it multiplies with, and the keys and values of each sequence,
once: bytes over bandwidth bound it. A prefill is bound by its multiply-adds. What is not counted
(norms, sampling, activations) makes a share lower, never higher.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.config import ModelConfig
from llmserve.layouts import expected_tensors

from .offline_limits import MemoryRate

__all__ = ["DeviceLimits", "limits_of", "prefill_multiply_adds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """What a device does in a second; None: not measured."""

    read_bytes: float | None = None
    """From memory."""
    multiply_adds: float | None = None
    """Of large matrices in the type of the arithmetic."""


def limits_of(device: str, dtype: str) -> DeviceLimits:
    """Measure a device now; of a CPU its memory alone, by the native kernels.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: The arithmetic's: `float32`, `bfloat16` or `float16`.
    """
    if device == "cpu":
        return DeviceLimits(read_bytes=MemoryRate().take())
    from llmserve.runners.torch_devices import matrix_rate, memory_rate
    from llmserve.runners.torch_runner import dtype_named

    return DeviceLimits(
        read_bytes=memory_rate(device), multiply_adds=matrix_rate(device, dtype_named(dtype))
    )


def prefill_multiply_adds(config: ModelConfig, context: int) -> int | None:
    """Of a prompt of `context` tokens, of which the last one has logits; None for a model with
    experts, whose tokens do not all meet the same weights."""
    if config.experts is not None:
        return None
    weights = sum(
        shape[0] * shape[1]
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and ".layers." in name
    )
    pairs = context * (context + 1) // 2
    attention = 2 * config.num_layers * config.q_size * pairs
    return context * weights + config.vocab_size * config.hidden_size + attention
