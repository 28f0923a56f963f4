"""Threads that each compute a part of a batch, so that they meet once in a step.

torch's own threads split every operation and wait for each other after it, about a thousand times
in a step of a small model: somewhat slower on an idle machine, and up to ten times on one where
another program now and then takes a core away, since all then wait for the thread that lost it.
Here the batch is split instead: every worker runs whole windows on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["BatchWorkers"]

T = TypeVar("T")


class BatchWorkers:
    """Runs a function on the parts of a batch, side by side."""

    def __init__(self, *, threads: int, max_parts: int) -> None:
        """Share `threads` among at most `max_parts` workers; sets torch's threads to the rest."""
        self._count = min(threads, max_parts)
        self._pool = ThreadPoolExecutor(self._count, "train") if self._count > 1 else None
        torch.set_num_threads(threads // self._count)

    def map(self, function: Callable[..., T], *tensors: Tensor) -> list[T]:
        """What `function` gives for each part of the rows of all `tensors`, in their order."""
        if self._pool is None:
            return [function(*tensors)]
        parts = (tensor.chunk(self._count) for tensor in tensors)
        return list(self._pool.map(function, *parts))
