"""The door to the extension module `_kernels`, which may be absent."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from ..errors import ConfigError

__all__ = ["INSTRUCTION_SETS", "available_paths", "choose_path", "load_kernels"]

INSTRUCTION_SETS = ("auto", "amx", "avx512", "avx2", "neon", "portable")
"""What may be asked for; `auto` is the best one that the processor has."""


@cache
def load_kernels() -> Any | None:
    """The extension module; None where it was not built or does not load on this machine."""
    try:
        return importlib.import_module("llmserve.native._kernels")
    except ImportError:
        return None


def available_paths() -> tuple[str, ...]:
    """Instruction sets of this build that the processor has, best first; none if not built."""
    kernels = load_kernels()
    return () if kernels is None else tuple(kernels.paths())


def choose_path(name: str = "auto") -> str:
    """The instruction set to use for the one asked for.

    Raises:
        ConfigError: it is unknown, or this processor does not have it.
    """
    if name not in INSTRUCTION_SETS:
        raise ConfigError(f"instruction set must be one of {INSTRUCTION_SETS}, got {name!r}")
    available = available_paths()
    if name == "auto":
        return available[0]
    if name not in available:
        raise ConfigError(
            f"this processor does not have the instruction set {name!r}; it has "
            f"{', '.join(available)}"
        )
    return name
