"""How much memory can be taken; as the machine and the control group tell. Linux alone tells."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Memory that can be taken without swapping, in the control group's limit; None: unknown."""
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
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if most == "max":
        return None
    # Files that were read count as used until something else needs the memory.
    sizes = dict(line.split() for line in stat)
    cached = int(sizes["active_file"]) + int(sizes["inactive_file"])
    return max(0, int(most) - max(0, used - cached))
