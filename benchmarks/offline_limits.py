"""What the machine allows beside what engines reach: its memory's rate, and a core lost to others.

One sequence's decode reads every weight once a token, so that bytes over bandwidth bound it. And a
server seldom has all cores to itself: an engine whose threads wait for each other in turns of equal
work can lose far more than the core that another process takes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmserve.native.kernels import available_paths, choose_path, load_kernels
from llmserve.runners.native_runner import default_threads

from .kernels_matrices import Pool, cache_size

__all__ = ["MemoryRate", "busy_process", "wait_for_spinning"]

_POOL_BYTES = 256 << 20
_SPIN = "print(flush=True)\nwhile True: pass"
_REST_S = 0.3
"""Longer than any engine's threads go on spinning after its work: ONNX Runtime's 35 ms, measured;
Intel's OpenMP 200 ms unless it is told otherwise."""


def wait_for_spinning() -> None:
    """Let the threads of the engine that had its turn come to rest: they keep a core from the next.

    How long they spin nobody tells, so this is a time and not a sign.
    """
    time.sleep(_REST_S)


class MemoryRate:
    """Bytes a second that all cores together read from memory, measured when it is asked for.

    It needs the native kernels, whose reading loop it times (as `bench kernels` does).
    """

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: None for one on each core. Allocates 256 MiB, or four caches."""
        self._threads = threads or default_threads()
        self._pool = Pool(max(_POOL_BYTES, 4 * cache_size())) if available_paths() else None

    def take(self) -> float | None:
        """Bytes a second now; None where the kernels are not built."""
        kernels = load_kernels()
        if kernels is None or self._pool is None:
            return None
        rates: tuple[float, ...] = kernels.measure_machine(
            choose_path("auto"), self._threads, self._pool.memory
        )
        return rates[0]


@contextmanager
def busy_process() -> Iterator[int]:
    """While the block runs, another process keeps one core busy; yields its id."""
    with subprocess.Popen([sys.executable, "-c", _SPIN], stdout=subprocess.PIPE) as process:  # noqa: S603 - our own interpreter
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it spins from here on
            yield process.pid
        finally:
            process.kill()
