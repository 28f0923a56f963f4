"""Whether models fit into memory: all of a server's together, or one more beside them."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError

from .served_model import Model
from .settings import ModelSettings
from .swap_gate import SwapRefusedError

__all__ = ["check_fits_beside", "check_start", "needed_bytes"]

MIB = 1 << 20
PROCESS_BYTES = 128 * MIB
"""What a loader and its engines take besides weights and caches."""


def check_start(models: Sequence[tuple[ModelSettings, Model]], available: int | None) -> None:
    """Refuse models that do not fit together.

    Args:
        models: Those that live in this machine's memory count.
        available: Bytes before any of them was loaded; None: unknown.

    Raises:
        ConfigError: with what each needs.
    """
    needed = [
        (model.checkpoint.path.name, needed_bytes(model.checkpoint, settings))
        for settings, model in models
        if settings.engine.device == "cpu"
    ]
    total = sum(size for _, size in needed)
    if available is None or total <= available:
        return
    each = ", ".join(f"{name} about {size // MIB}" for name, size in needed)
    raise ConfigError(
        f"the models need about {total // MIB} MiB ({each}) and {available // MIB} "
        "MiB are available: serve fewer, with a smaller --kv-cache-memory, or quantized ones"
    )


def check_fits_beside(
    checkpoint: Checkpoint, settings: ModelSettings, available: int | None
) -> None:
    """Refuse a model that would not fit beside what is served.

    Raises:
        SwapRefusedError: with both numbers.
    """
    needed = needed_bytes(checkpoint, settings)
    if available is not None and needed > available:
        raise SwapRefusedError(
            f"the new model needs about {needed // MIB} MiB beside what is served, and "
            f"{available // MIB} MiB are available: make room, serve with a smaller "
            "--kv-cache-memory, or with --swap drain"
        )


def needed_bytes(checkpoint: Checkpoint, settings: ModelSettings) -> int:
    """About what the weights, an output layer made at load, caches and processes will take."""
    config = checkpoint.config
    num_engines = settings.num_replicas + settings.num_prefill_engines
    caches = num_engines * settings.engine.cache_bytes + settings.engine.handover_bytes
    head = config.vocab_size * config.hidden_size
    processes = settings.engine.tensor_parallel_size * PROCESS_BYTES
    return checkpoint.stored_bytes() + head + caches + processes
