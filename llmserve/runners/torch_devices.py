"""Devices: which one an engine takes, whether it is there, and what it does at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..errors import ConfigError

__all__ = ["checked_device", "matrix_rate", "memory_rate", "nth_device"]

_MATRIX_SIZE = 8192
_MEMORY_BYTES = 1 << 30
_REPEATS = 5


def checked_device(name: str) -> torch.device:
    """The device of that name. Raises `ConfigError` for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        build = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        raise ConfigError(
            f"device {name}: torch finds {found or 'no'} CUDA devices{build}; choose another, or "
            "leave the device out to compute on the CPU"
        )
    return device


def nth_device(index: int, *, num_ranks: int) -> str:
    """The first device of engine `index`, each of which has `num_ranks` of them in a row.

    More engines than there are devices for share them. `cuda` where there are too few for one.
    """
    num_places = torch.cuda.device_count() // num_ranks
    return f"cuda:{index % num_places * num_ranks}" if num_places else "cuda"


def matrix_rate(device: torch.device | str, dtype: torch.dtype, size: int = _MATRIX_SIZE) -> float:
    """Multiply-adds a second in the product of two matrices of `size`: the best of five."""
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return size**3 / _least_seconds(lambda: torch.mm(matrix, matrix), matrix.device)


def memory_rate(device: torch.device | str, num_bytes: int = _MEMORY_BYTES) -> float:
    """Bytes a second that come and go where memory is copied within the device: the best of five.

    Takes twice `num_bytes`.
    """
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), source.device)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one run; the first one, which may compile, is not counted."""
    seconds = [_seconds(work, device) for _ in range(1 + _REPEATS)]
    return min(seconds[1:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
