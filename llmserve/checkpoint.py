"""A model folder, opened: the Hugging Face layout, with our manifest where there is one.

`Checkpoint.open` believes nothing before it is checked: the manifest's hashes, the configuration's
bounds, then names, types and shapes of all tensors against what the configuration implies. Weights
are mapped, not read; torch is not needed. Folders are written by `save_model`, which lives in
`model_folder.py` and is offered here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .config_values import first
from .durable import verify_manifest
from .errors import CheckpointError, ConfigError
from .families import parse_config, with_generation_config
from .layouts import (
    Family,
    Part,
    expected_tensors,
    has_canonical_names,
    linear_layers,
    stored_parts,
)
from .manifest import MANIFEST
from .model_files import Weights, check_model_folder, graph_in, map_weights
from .model_folder import save_model
from .quant.config import QuantizationConfig
from .quant.dtypes import FLOAT_DTYPES, Float32Array, StoredArray, TensorSpec, to_float32
from .quant.layout import AnyQuantizedLinear, decode_layer, layer_specs
from .strict_json import read_json
from .tensor_file import drop_pages

__all__ = ["Checkpoint", "save_model"]

FloatName = Literal["float32", "bfloat16", "float16"]


class Checkpoint:
    """The weights of a model folder under canonical names (`layouts.py`), linear ones [out, in].

    Arrays are read-only views of the mapped files, which must not be changed in place meanwhile;
    replacing the folder by another is harmless.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        quantization: QuantizationConfig | None,
        family: Family,
        weights: Weights,
    ) -> None:
        """Use `Checkpoint.open`: the arguments here are not checked."""
        self.path = path
        self.config = config
        self.quantization = quantization
        """How the linear layers are quantized; None where they are not."""
        self._weights = weights
        self._parts = stored_parts(config, family)
        self._quantized = {
            f"{layer}.weight"
            for layer in linear_layers(config)
            if quantization is not None and quantization.is_quantized(layer)
        }

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Checkpoint:
        """Open the model folder at `path`.

        Args:
            path: The folder.
            verify: Compare all files with the manifest first, which reads them once. A folder
                without manifest is opened with one warning in the log.

        Raises:
            CheckpointError: it is missing, damaged, malformed, or a model that is not supported.
                The message begins with the file at fault.
        """
        path = Path(path)
        check_model_folder(path)
        if verify:
            verify_manifest(path)
        values = read_json(path / "config.json")
        config, quantization = _read_config(path, values)
        family: Family = values["model_type"]
        weights = map_weights(path, family)
        if not weights.arrays:
            return cls(path, config, quantization, family, weights)
        _check_tensors(weights, config, quantization, family)
        if first(values.get("dtype"), values.get("torch_dtype")) is None:
            embedding = stored_parts(config, family)["model.embed_tokens.weight"].name
            dtype = cast(FloatName, weights.arrays[embedding].dtype)
            config = dataclasses.replace(config, dtype=dtype)
        return cls(path, config, quantization, family, weights)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the manifest; without one, of configuration and weights, all of them read."""
        if (self.path / MANIFEST).is_file():
            return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for file in (self.path / "config.json", *self._weights.files):
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()

    @property
    def graph(self) -> Path | None:
        """The exported graph in the folder, or in its folder `onnx`; None where there is none."""
        return graph_in(self.path)

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to read: not in a folder that holds a graph in their place."""
        return bool(self._weights.arrays)

    def names(self) -> list[str]:
        """Canonical names of the model's tensors; a quantized layer counts as its weight."""
        return list(self._parts)

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor `name` is the weight of a quantized layer."""
        return name in self._quantized

    def stored_tensors(self) -> Mapping[str, StoredArray]:
        """Every tensor as it is stored, by stored name; none where there is a graph."""
        return self._weights.arrays

    def drop_pages(self) -> None:
        """Give back the memory of what was read of the files; it is read again when needed."""
        drop_pages(self._weights.arrays.values())

    def stored_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(array.nbytes for array in self._weights.arrays.values())

    def weight_file_bytes(self) -> int:
        """Bytes of the files that hold the weights, or the graph."""
        return sum(file.stat().st_size for file in self._weights.files)

    def stored(self, name: str) -> StoredArray:
        """The tensor `name` as it is stored, a view where the layout allows.

        Raises:
            CheckpointError: the model has no such tensor, or it is quantized (use `linear`).
        """
        if self.is_quantized(name):
            raise CheckpointError(f"{self.path}: {name} is quantized; it has no single array")
        part = self._part(name)
        array = self._weights.arrays[part.name]
        whole = array.data.T if part.is_transposed else array.data
        return StoredArray(array.dtype, whole[part.start : part.stop])

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of `stored(name)`: bfloat16 as `uint16`, see `dtype_of`."""
        return self.stored(name).data

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, quantized or not; linear ones [out, in]."""
        part = self._part(name)
        width = part.shape[0] if part.is_transposed else part.shape[-1]
        return (
            (part.stop - part.start, width) if len(part.shape) == 2 else (part.stop - part.start,)
        )

    def dtype_of(self, name: str) -> str:
        """Type name of `array(name)`."""
        return self.stored(name).dtype

    def linear(self, name: str) -> AnyQuantizedLinear | Float32Array:
        """The weight `name` of a linear layer: quantized as it is stored, otherwise float32.

        Raises:
            CheckpointError: the model has no such tensor, or what is stored is malformed.
        """
        if not self.is_quantized(name) or self.quantization is None:
            return to_float32(self.stored(name))
        out, width = self._part(name).shape
        layer = name.removesuffix(".weight")
        try:
            return decode_layer(self.quantization, layer, (out, width), self._weights.arrays)
        except CheckpointError as error:
            files = self._weights.file_of
            file = next(files[stored] for stored in files if stored.startswith(f"{layer}."))
            raise CheckpointError(f"{file}: {error}") from error

    def quantized_parts(self, name: str) -> dict[str, StoredArray]:
        """The tensors that hold the quantized weight `name`, by the end of their names.

        For who has a layout of its own: views of the files, types and shapes checked.

        Raises:
            CheckpointError: the tensor `name` is not quantized.
        """
        if not self.is_quantized(name) or self.quantization is None:
            raise CheckpointError(f"{self.path}: {name} is not quantized")
        layer = name.removesuffix(".weight")
        shape = cast(tuple[int, int], self._part(name).shape)
        specs = layer_specs(self.quantization, layer, shape) or {}
        return {stored.removeprefix(f"{layer}."): self._weights.arrays[stored] for stored in specs}

    def float32(self, name: str) -> Float32Array:
        """The tensor `name` as float32, dequantized if it is quantized. Raises as `linear` does."""
        value = self.linear(name)
        return value.dequantize() if not isinstance(value, np.ndarray) else value

    def _part(self, name: str) -> Part:
        if not self.has_weights:
            raise CheckpointError(
                f"{self.path}: holds an ONNX graph in place of weights; the onnx runner alone "
                "executes it. Give the folder that it was made from"
            )
        if name not in self._parts:
            raise CheckpointError(f"{self.path}: the model has no tensor {name}")
        return self._parts[name]


def _read_config(
    path: Path, values: dict[str, Any]
) -> tuple[ModelConfig, QuantizationConfig | None]:
    generation = path / "generation_config.json"
    source = path / "config.json"
    try:
        config = parse_config(values)
        quantization = None
        rendered = values.get("quantization_config")
        if rendered is not None:
            if not isinstance(rendered, dict):
                raise ConfigError("quantization_config must be an object")
            quantization = QuantizationConfig.parse(rendered)
            if not has_canonical_names(values["model_type"]):
                raise ConfigError(
                    f"quantized weights of model_type {values['model_type']!r} are not supported"
                )
        if generation.exists():
            source = generation
            config = with_generation_config(config, read_json(generation))
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return config, quantization


def _check_tensors(
    weights: Weights, config: ModelConfig, quantization: QuantizationConfig | None, family: Family
) -> None:
    """Compare what is stored with what the configuration implies, name by name."""
    expected = _expected_specs(weights.files[0], config, quantization, family)
    for name, spec in expected.items():
        if name not in weights.arrays:
            raise CheckpointError(
                f"{weights.files[0]}: tensor {name} is missing, which config.json implies"
            )
        found = weights.arrays[name]
        if not spec.accepts(found):
            raise CheckpointError(
                f"{weights.file_of[name]}: tensor {name} is {found.dtype} {list(found.shape)}; "
                f"config.json implies {spec}"
            )
    for name in sorted(weights.arrays.keys() - expected.keys()):
        if name != "lm_head.weight" or not _is_copy_of_embedding(weights, config, family):
            raise CheckpointError(
                f"{weights.file_of[name]}: tensor {name} has no place in the model that "
                "config.json describes"
            )


def _expected_specs(
    source: Path, config: ModelConfig, quantization: QuantizationConfig | None, family: Family
) -> dict[str, TensorSpec]:
    """Stored name → what the files must hold under it."""
    specs = {
        part.name: TensorSpec(FLOAT_DTYPES, part.shape)
        for part in stored_parts(config, family).values()
    }
    if quantization is None:
        return specs
    shapes = expected_tensors(config)
    for layer in linear_layers(config):
        out, width = shapes[f"{layer}.weight"]
        try:
            quantized = layer_specs(quantization, layer, (out, width))
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        if quantized is not None:
            del specs[f"{layer}.weight"]
            specs |= quantized
    return specs


def _is_copy_of_embedding(weights: Weights, config: ModelConfig, family: Family) -> bool:
    """Whether a tied model's output layer was stored all the same, as some programs do."""
    embedding = stored_parts(config, family)["model.embed_tokens.weight"].name
    head, table = weights.arrays["lm_head.weight"], weights.arrays[embedding]
    return (
        config.tie_word_embeddings
        and head.dtype == table.dtype
        and np.array_equal(head.data, table.data)
    )
