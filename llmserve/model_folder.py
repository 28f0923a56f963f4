"""Writing a model folder: weights in the layout of their family, configuration, manifest.

The folder appears at once (`durable.StagedFolder`). A model that transformers knows is written so
that transformers opens it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .durable import StagedFolder, write_bytes, write_json
from .errors import CheckpointError, ConfigError
from .families import Family, family_of, render_config, render_generation_config
from .layouts import (
    Part,
    expected_tensors,
    has_canonical_names,
    linear_layers,
    stored_parts,
    written_name,
)
from .quant.bnb import BitsAndBytesLinear
from .quant.dtypes import StoredArray, from_float32
from .quant.groups import QuantizedLinear
from .quant.layout import AnyQuantizedLinear, config_of, encode_layer
from .tensor_file import write_tensors

__all__ = ["TOKENIZER_FILES", "WeightValue", "save_model"]

WeightValue = npt.NDArray[Any] | StoredArray | AnyQuantizedLinear
"""What a tensor may be given as: float32 values (rounded to the model's type), an array that is
stored as it is, or a quantized layer under its weight's name."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files of a model folder that belong to its tokenizer."""

_OURS = {"config.json", "generation_config.json", "manifest.json", "model.safetensors"}


def save_model(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, WeightValue],
    *,
    copy_from: Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    has_int8_activations: bool = False,
    has_int8_cache: bool = False,
    overwrite: bool = False,
    on_written: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write a model folder that appears at once, or not at all.

    Args:
        folder: Where; made, with its parents.
        config: The model; its `dtype` is the type of float32 values on disk.
        tensors: Every canonical tensor of `expected_tensors(config)`.
        copy_from: A model folder whose tokenizer files are copied.
        extra_files: Further files by plain name; they win over copied ones.
        has_int8_activations: Whether int8 layers ask for int8 activations too (W8A8).
        has_int8_cache: Whether a quantized folder asks for an int8 KV cache.
        overwrite: Replace a folder that has files in it.
        on_written: Given the folder before it appears, complete but for its manifest; may add
            files, or refuse it with an exception.

    Raises:
        ConfigError: the folder exists and is not empty, or a name in `extra_files` is not plain
            or one that is written here.
        CheckpointError: a tensor is missing, unknown or of another shape.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    files = _copied_files(copy_from) | dict(extra_files or {})
    for name in files:
        if name in _OURS or Path(name).name != name or name.startswith("."):
            raise ConfigError(f"a model folder cannot be given a file called {name!r}")
    _check_names(config, tensors)
    quantized = {
        name.removesuffix(".weight"): value
        for name, value in tensors.items()
        if isinstance(value, QuantizedLinear | BitsAndBytesLinear)
    }
    family = family_of(config)
    if quantized and not has_canonical_names(family):
        family = "llmserve"  # what is joined or turned there has no quantized form
    values = render_config(config, family)
    if quantized:
        plain = tuple(name for name in linear_layers(config) if name not in quantized)
        values["quantization_config"] = config_of(
            quantized, plain,
            has_int8_activations=has_int8_activations, has_int8_cache=has_int8_cache,
        ).render()  # fmt: skip
    with StagedFolder(folder, overwrite=overwrite) as staged:
        write_json(staged.path / "config.json", values)
        write_json(staged.path / "generation_config.json", render_generation_config(config))
        for name, data in sorted(files.items()):
            write_bytes(staged.path / name, data)
        write_tensors(staged.path / "model.safetensors", _to_stored(config, family, tensors))
        on_written(staged.path)


def _copied_files(source: Path | None) -> dict[str, bytes]:
    if source is None:
        return {}
    paths = (source / name for name in TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _check_names(config: ModelConfig, tensors: Mapping[str, WeightValue]) -> None:
    expected = expected_tensors(config)
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        raise CheckpointError(
            f"the tensors do not fit the configuration: missing {sorted(missing)[:4]}, "
            f"unknown {sorted(unknown)[:4]}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor {name} has the shape {list(tensors[name].shape)}, expected {list(shape)}"
            )


def _to_stored(
    config: ModelConfig, family: Family, tensors: Mapping[str, WeightValue]
) -> dict[str, StoredArray]:
    stored: dict[str, StoredArray] = {}
    pieces: dict[str, list[tuple[Part, StoredArray]]] = {}
    for name, part in stored_parts(config, family).items():
        value = tensors[name]
        if isinstance(value, QuantizedLinear | BitsAndBytesLinear):
            stored |= encode_layer(name.removesuffix(".weight"), value)
            continue
        if not isinstance(value, StoredArray):
            value = from_float32(value.astype(np.float32, copy=False), config.dtype)
        pieces.setdefault(part.name, []).append((part, value))
    stored |= {name: _join(parts) for name, parts in pieces.items()}
    return {written_name(name, config, family): array for name, array in stored.items()}


def _join(pieces: list[tuple[Part, StoredArray]]) -> StoredArray:
    """One stored tensor from the canonical ones that it holds."""
    pieces = sorted(pieces, key=lambda piece: piece[0].start)
    part, first = pieces[0]
    if any(array.dtype != first.dtype for _, array in pieces):
        raise CheckpointError(f"the parts of {part.name} are of different types")
    data = first.data if len(pieces) == 1 else np.concatenate([array.data for _, array in pieces])
    return StoredArray(first.dtype, data.T if part.is_transposed else data)
