"""Whether files are the ones that were read before, without reading them again."""

from __future__ import annotations

from pathlib import Path

from .engine_settings import EngineSettings

__all__ = ["Stamp", "stamp_of"]

Stamp = dict[str, tuple[int, int, int, int]]
"""Path → device, inode, size and time of the last change in nanoseconds."""

READ_SUFFIXES = (".json", ".safetensors")


def stamp_of(settings: EngineSettings) -> Stamp:
    """The stamp of every file that a loader reads: the model's, its adapters' and the draft
    model's. A folder that cannot be read has none."""
    folders = [settings.model, *settings.adapters.values(), *filter(None, [settings.draft_model])]
    stamp: Stamp = {}
    for folder in folders:
        try:
            files = [file for file in Path(folder).iterdir() if file.suffix in READ_SUFFIXES]
            for file in files:
                status = file.stat()
                stamp[str(file)] = (
                    status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
                )  # fmt: skip
        except OSError:
            continue
    return stamp
