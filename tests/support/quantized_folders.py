"""Folders rounded to nearest, for tests of what executes them: without report and certificate."""

from __future__ import annotations

from pathlib import Path

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.export.quantize import Scheme, quantize_model

__all__ = ["write_quantized"]


def write_quantized(
    path: Path, out: Path, scheme: Scheme, group_size: int | None = None, *,
    has_int8_cache: bool = False,
) -> None:  # fmt: skip
    """The model folder `path` quantized into the new folder `out`, with its tokenizer."""
    source = Checkpoint.open(path)
    tensors = quantize_model(source, scheme, group_size).tensors(source)
    save_model(out, source.config, tensors, copy_from=path, has_int8_cache=has_int8_cache)
