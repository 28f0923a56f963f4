"""The machine, the versions and the command: what a figure means nothing without."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmserve import __version__

__all__ = ["command_line", "date_and_machine", "machine", "versions"]

SECRET_OPTIONS = ("--header",)


def machine() -> dict[str, object]:
    """Processor, cores that this process may use, memory and system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cores_total": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Version of Python, of llmserve and of each of `packages` (None: not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version(), "llmserve": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as typed, to be run again; values of headers are hidden, they may be keys."""
    given = list(sys.argv if argv is None else argv)
    program = Path(given[0]).name
    shown = ["llmserve" if program == "__main__.py" else program]  # python -m llmserve
    is_secret = False
    for word in given[1:]:
        if word.startswith("--"):
            name, is_joined, value = word.partition("=")
            is_secret = name in SECRET_OPTIONS
            shown.append(f"{name}={_hidden(value)}" if is_secret and is_joined else word)
        else:
            shown.append(_hidden(word) if is_secret else word)
    return shlex.join(shown)


def date_and_machine(document: Mapping[str, Any]) -> str:
    """When and where the run of a benchmark's `document` was, in words."""
    date, machine = document["date"], document["machine"]
    return (
        f"{date[:4]}-{date[4:6]}-{date[6:8]}, {machine['cores']} cores of {machine['cpu']}, "
        f"{(machine['memory_bytes'] or 0) / 2**30:.0f} GiB"
    )


def _hidden(header: str) -> str:
    return header.partition("=")[0] + "=..."


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
