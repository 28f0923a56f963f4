"""What may be asked of the native runner, and when it cannot run a model.

Neither needs the kernels or the weights: the command line and the registry ask before anything is
loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..native.kernels import load_kernels

__all__ = ["BLOCK_TOKENS", "NativeOptions", "obstacle_to_native"]

BLOCK_TOKENS = 16
"""The size of a KV block is a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOptions:
    """How the native runner executes a model."""

    activations: Literal["auto", "integer", "float32"] = "auto"
    """What integer weights are multiplied with; `auto`: integer."""
    head_weights: Literal["auto", "int8", "int4", "float"] = "auto"
    """The output layer: integers made at load, or as stored; `auto`: int8 in a quantized folder."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    """Type of keys and values; `auto`: int8 where the folder asks for it, else float32 for float32
    models, else bfloat16. The torch runner takes it too: there `auto` is int8 or the type of the
    arithmetic, and fp8 is its alone."""
    instruction_set: Literal["auto", "amx", "avx512", "avx2", "neon", "portable"] = "auto"
    """Which of the processor's to use; `auto`: the best."""


def obstacle_to_native(
    checkpoint: Checkpoint, *, dtype: str | None, device: str, block_size: int | None = None,
    tensor_parallel_size: int = 1,
) -> str | None:  # fmt: skip
    """Why the native runner cannot run a model; None: it can.

    `block_size` is that of the KV cache to be allocated, in tokens, where it is known.
    """
    if tensor_parallel_size > 1:
        return f"it computes in one process, not in {tensor_parallel_size}"
    if device != "cpu":
        return f"it runs on cpu, not on {device}"
    if load_kernels() is None:
        return "its kernels are not built; installing llmserve where there is a C++ compiler does"
    if dtype == "float16":
        return "it computes in float32 or bfloat16, not in float16"
    if block_size is not None and block_size % BLOCK_TOKENS:
        return f"its KV blocks have a multiple of {BLOCK_TOKENS} tokens, not {block_size}"
    return _unequal_experts(checkpoint)


def _unequal_experts(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.config
    if config.experts is None or checkpoint.quantization is None:
        return None
    from ..native.matrices import specify_block
    from ..native.weights import Form, WeightSegment

    segment = WeightSegment(checkpoint, Form(floats="float32"))
    try:
        for layer in range(config.num_layers):
            specify_block(config, segment, layer, has_adapters=False)
    except CheckpointError as error:
        return str(error)
    return None
