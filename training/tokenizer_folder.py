"""A tokenizer's folder: what `--tokenizer FOLDER` reads, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from llmserve.durable import StagedFolder, write_bytes
from llmserve.text.tokenizer import Tokenizer

__all__ = ["write_tokenizer"]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, overwrite: bool = False) -> None:
    """Write the tokenizer's files and their manifest into `folder`.

    Raises:
        ConfigError: `folder` has files in it and not `overwrite`.
        OSError: the disk is full, or nothing may be written there; what was there stays.
    """
    with StagedFolder(folder, overwrite=overwrite) as staged:
        for name, data in tokenizer.files().items():
            write_bytes(staged.path / name, data)
