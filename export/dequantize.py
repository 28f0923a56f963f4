"""A quantized model folder written back as a plain one: what every program opens, at full size.

The weights are what the integers or code books stand for, rounded to the type asked for; what
quantizing lost stays lost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import ConfigError, ExportError
from llmserve.lineage import history_files
from llmserve.quant.dtypes import StoredArray, from_float32, to_float32

from .target import check_target

__all__ = ["Dequantized", "dequantize_folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantized:
    """What was written."""

    path: Path
    """The folder."""
    form: str
    """What the weights were."""
    dtype: str
    """What they are."""
    num_bytes: int
    """Of all tensors."""


def dequantize_folder(
    path: Path, out: Path, *, dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
) -> Dequantized:  # fmt: skip
    """Write the quantized folder `path` as the plain model folder `out`.

    Args:
        path: a folder that is quantized in any form that llmserve reads.
        out: where; it appears complete or not at all.
        dtype: type of all weights; None: the type that the folder's configuration names.
        overwrite: replace `out` if it is a folder that llmserve wrote.

    Raises:
        CheckpointError: the model cannot be opened.
        ConfigError: it is not quantized, or `out` must not be written.
        ExportError: a weight beyond the range of `dtype`.
        OSError: the disk.
    """
    check_target(path, out, overwrite=overwrite)
    source = Checkpoint.open(path)
    if source.quantization is None:
        raise ConfigError(f"{path} is not quantized; there is nothing to be done")
    config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    entry = {
        "source": source.fingerprint,
        "form": source.quantization.scheme,
        "dtype": config.dtype,
    }
    tensors = {name: _plain(source, name, config.dtype) for name in source.names()}
    save_model(
        out,
        config,
        tensors,
        copy_from=path,
        extra_files=history_files(path, "dequantization", entry),
        overwrite=overwrite,
    )
    return Dequantized(
        path=out,
        form=source.quantization.scheme,
        dtype=config.dtype,
        num_bytes=sum(array.nbytes for array in tensors.values()),
    )


def _plain(source: Checkpoint, name: str, dtype: str) -> StoredArray:
    stored = from_float32(source.float32(name), dtype)
    if not np.isfinite(to_float32(stored)).all():
        raise ExportError(f"{name} holds a weight beyond the range of {dtype}; choose float32")
    return stored
