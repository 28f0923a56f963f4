"""What may be asked of the native runner alone, and when it cannot run a model.

Neither needs the kernels or the weights: the command line and the registry ask before anything is
loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checkpoint import Checkpoint
from ..native.kernels import load_kernels

__all__ = ["NativeOptions", "obstacle_to_native"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOptions:
    """How the native runner executes a model."""

    activations: Literal["int8", "float32"] = "int8"
    """What integer weights are multiplied with."""
    head_weights: Literal["auto", "int8", "int4", "float"] = "auto"
    """The output layer: integers made at load, or as stored; `auto`: int8 in a quantized folder."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of keys and values; `auto`: float32 for float32 models, else bfloat16."""
    instruction_set: Literal["auto", "avx512", "avx2", "portable"] = "auto"
    """Which of the processor's to use; `auto`: the best."""


def obstacle_to_native(checkpoint: Checkpoint, *, dtype: str | None, device: str) -> str | None:
    """Why the native runner cannot run a model; None: it can."""
    if device != "cpu":
        return f"it runs on cpu, not on {device}"
    if load_kernels() is None:
        return "its kernels are not built; installing llmserve where there is a C++ compiler does"
    if checkpoint.config.head is not None:
        return f"it generates text, and the model has a head of kind {checkpoint.config.head.kind}"
    if dtype == "float16":
        return "it computes in float32 or bfloat16, not in float16"
    return None
