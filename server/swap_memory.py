"""Whether the machine holds a second model beside the served one."""

from __future__ import annotations

from pathlib import Path

from llmserve.checkpoint import Checkpoint

from .settings import ServerSettings
from .swap_gate import SwapRefusedError

__all__ = ["available_bytes", "check_memory", "needed_bytes"]

MIB = 1 << 20
PROCESS_BYTES = 128 * MIB
"""What a loader and its engines take besides weights and caches."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(checkpoint: Checkpoint, settings: ServerSettings) -> None:
    """Refuse a model that would not fit beside the one that is served.

    Raises:
        SwapRefusedError: with both numbers.
    """
    available = available_bytes()
    needed = needed_bytes(checkpoint, settings)
    if available is not None and needed > available:
        raise SwapRefusedError(
            f"the new model needs about {needed // MIB} MiB beside the one that is served, and "
            f"{available // MIB} MiB are available: make room, serve with a smaller "
            "--kv-cache-memory, or with --swap drain"
        )


def needed_bytes(checkpoint: Checkpoint, settings: ServerSettings) -> int:
    """About what the weights, an output layer made at load, caches and processes will take."""
    config = checkpoint.config
    caches = settings.num_replicas * settings.engine.cache_bytes
    head = config.vocab_size * config.hidden_size
    return checkpoint.stored_bytes() + head + caches + PROCESS_BYTES


def available_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Memory that can be taken without swapping, within the control group's limit; None: unknown.

    Linux alone tells.
    """
    found = [_read_meminfo(meminfo), _read_cgroup(cgroup)]
    known = [value for value in found if value is not None]
    return min(known, default=None)


def _read_meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _read_cgroup(folder: Path) -> int | None:
    try:
        most = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - int(used))
