"""Where a command may write: a new or empty folder, or one of ours that is to be replaced.

`StagedFolder` replaces a whole folder. So `--overwrite` is good only for a folder that llmserve
wrote (it has a manifest) and that does not hold the model that is being read.
"""

from __future__ import annotations

from pathlib import Path

from llmserve.errors import ConfigError
from llmserve.manifest import MANIFEST

__all__ = ["check_target"]


def check_target(source: Path, out: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` unless the folder `out` may be written from the model in `source`."""
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--out {out} holds the model that is read; give another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} exists and is not empty; give another --out, or --overwrite")
    if not (out / MANIFEST).is_file():
        raise ConfigError(
            f"{out} was not written by llmserve (it has no {MANIFEST}), so it is not overwritten; "
            "give another --out"
        )
