"""LoRA adapters: small matrices beside a model's own, in the files of the PEFT library.

An adapter adds `scale · B A x` to a projection's output, with A [r, in], B [out, r] and a scale of
alpha / r (Hu et al., arXiv 2106.09685, section 4.1). A folder holds `adapter_config.json` and
`adapter_model.safetensors`. Layers go by their canonical names (`layouts.py`), which are Llama's;
GPT-2's own, whose layers are fused and transposed, are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .adapter_config import AdapterConfig, is_named, parse_adapter_config, render_adapter
from .config import ModelConfig
from .durable import StagedFolder, verify_manifest, write_json
from .errors import CheckpointError, ConfigError
from .layouts import expected_tensors
from .manifest import MANIFEST
from .quant.dtypes import (
    FLOAT_DTYPES,
    Float32Array,
    StoredArray,
    TensorSpec,
    from_float32,
    to_float32,
)
from .strict_json import read_json
from .tensor_file import map_tensors, write_tensors

__all__ = ["Adapter", "LoraPair", "Place", "load_adapter", "save_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,4})\.\w+\.(\w+)\.lora_[AB]\.weight", re.ASCII
)
_HALF_OF = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
_ALLOWED = f"adapters hold lora_A and lora_B of {', '.join(_HALF_OF)}"


class Place(NamedTuple):
    """One projection of the model."""

    layer_index: int
    projection: str
    """`q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` or `down_proj`."""

    @property
    def module(self) -> str:
        """Canonical name of the layer, without `.weight`."""
        return f"model.layers.{self.layer_index}.{_HALF_OF[self.projection]}.{self.projection}"

    def tensor(self, half: str) -> str:
        """Name of the stored matrix `A` or `B`."""
        return f"base_model.model.{self.module}.lora_{half}.weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraPair:
    """What is added to one projection: `scale · b (a x)`."""

    a: Float32Array  # [r, in]
    b: Float32Array  # [out, r]
    alpha: float
    """Numerator of the scale. Finite."""

    @property
    def rank(self) -> int:
        """r, the width between the two matrices."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """One LoRA adapter in float32. Its arrays must not be changed. `ConfigError` without pairs."""

    name: str
    """What requests call it."""
    pairs: Mapping[Place, LoraPair]
    """The adapted projections, at least one."""
    source: Path | None = None
    """The file that it was read from, for messages."""
    fingerprint: str = field(init=False)
    """sha256 of what it does: places, matrices and scales, without the name."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ConfigError(f"adapter {self.name!r} adapts nothing")
        object.__setattr__(self, "fingerprint", _digest(self.pairs))

    @property
    def rank(self) -> int:
        """The largest rank of its pairs."""
        return max(pair.rank for pair in self.pairs.values())

    def check(self, config: ModelConfig) -> None:
        """Compare every pair with the projection that it would adapt.

        Raises:
            CheckpointError: the model has no such projection, or it is of another size; the message
                names file and tensor.
        """
        where = self.source or f"adapter {self.name!r}"
        shapes = expected_tensors(config)
        for place, pair in self.pairs.items():
            shape = shapes.get(f"{place.module}.weight")
            if shape is None:
                raise CheckpointError(
                    f"{where}: tensor {place.tensor('A')}: the model has no {place.module}"
                )
            for half, values, wanted in (
                ("A", pair.a, (pair.rank, shape[1])),
                ("B", pair.b, (shape[0], pair.rank)),
            ):
                if values.shape != wanted:
                    raise CheckpointError(
                        f"{where}: tensor {place.tensor(half)} is {list(values.shape)}; the model "
                        f"takes {list(wanted)}"
                    )


def load_adapter(name: str, path: Path) -> Adapter:
    """The adapter in the folder `path`, to be called `name`.

    Whether it fits a model is for `Adapter.check` to say.

    Raises:
        CheckpointError: the folder is missing, damaged or malformed, or an adapter of a kind that
            is not supported; the message names the file, and the setting or tensor.
    """
    source, weights = path / _CONFIG, path / _WEIGHTS
    if not source.is_file():
        raise CheckpointError(f"{path}: has no {_CONFIG}, so it is no adapter folder")
    if not weights.is_file():
        raise CheckpointError(f"{path}: has no {_WEIGHTS}; pickled weights are never opened")
    if (path / MANIFEST).is_file():  # PEFT writes none
        verify_manifest(path)
    config = parse_adapter_config(read_json(source), source)
    for target in config.target_modules or ():
        if target.rpartition(".")[2] not in _HALF_OF:
            raise CheckpointError(f"{source}: target_modules: {target!r}: {_ALLOWED}")
    arrays = _read_arrays(weights)
    _check_targets(source, config, arrays)
    pairs = {place: _pair(weights, config, place, arrays[place]) for place in sorted(arrays)}
    return Adapter(name=name, pairs=pairs, source=weights)


def save_adapter(folder: Path, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Write the adapter as a folder that PEFT reads, with our manifest; whole or not at all.

    Raises:
        ConfigError: `folder` must not be written.
        OSError: the disk refuses.
    """
    settings = {
        (place.layer_index, place.module): (pair.rank, pair.alpha)
        for place, pair in adapter.pairs.items()
    }
    tensors = {
        place.tensor(half): from_float32(values, "float32")
        for place, pair in adapter.pairs.items()
        for half, values in (("A", pair.a), ("B", pair.b))
    }
    with StagedFolder(folder, overwrite=overwrite) as staged:
        write_json(staged.path / _CONFIG, render_adapter(settings))
        write_tensors(staged.path / _WEIGHTS, tensors)


def _read_arrays(path: Path) -> dict[Place, dict[str, StoredArray]]:
    """The stored matrices of each place, by `A` and `B`."""
    arrays: dict[Place, dict[str, StoredArray]] = {}
    for name, array in map_tensors(path).items():
        place = _place_of(name)
        if place is None:
            raise CheckpointError(f"{path}: tensor {name}: {_ALLOWED}")
        arrays.setdefault(place, {})["A" if name == place.tensor("A") else "B"] = array
    if not arrays:
        raise CheckpointError(f"{path}: holds no tensors")
    return arrays


def _place_of(name: str) -> Place | None:
    """The place that the tensor `name` belongs to; None if it is none of an adapter's matrices."""
    match = _TENSOR.fullmatch(name)
    if match is None or match[2] not in _HALF_OF:
        return None
    place = Place(int(match[1]), match[2])
    return place if name in (place.tensor("A"), place.tensor("B")) else None


def _check_targets(source: Path, config: AdapterConfig, places: Iterable[Place]) -> None:
    """Compare the modules that the configuration lists with those that have tensors."""
    targets = config.target_modules
    if targets is None:
        return
    modules = [place.module for place in places]
    for target in targets:
        if not any(is_named(module, target) for module in modules):
            raise CheckpointError(f"{source}: target_modules: {target!r} has no tensors")
    for module in modules:
        if not any(is_named(module, target) for target in targets):
            raise CheckpointError(
                f"{source}: target_modules: {module}, which has tensors, is missing"
            )


def _pair(
    path: Path, config: AdapterConfig, place: Place, arrays: Mapping[str, StoredArray]
) -> LoraPair:
    rank, alpha = config.settings_of(place.module)
    values = {}
    for half, shape in (("A", (rank, None)), ("B", (None, rank))):
        name, spec = place.tensor(half), TensorSpec(FLOAT_DTYPES, shape)
        if half not in arrays:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        if not spec.accepts(arrays[half]):
            found = arrays[half]
            raise CheckpointError(
                f"{path}: tensor {name} is {found.dtype} {list(found.shape)}; {_CONFIG} implies "
                f"{spec}"
            )
        values[half] = np.array(to_float32(arrays[half]))
        if not np.isfinite(values[half]).all():
            raise CheckpointError(f"{path}: tensor {name} holds values that are not finite")
    return LoraPair(a=values["A"], b=values["B"], alpha=alpha)


def _digest(pairs: Mapping[Place, LoraPair]) -> str:
    digest = hashlib.sha256()
    for place in sorted(pairs):
        pair = pairs[place]
        digest.update(f"{place.module} {pair.a.shape} {pair.b.shape} {pair.scale!r}\n".encode())
        digest.update(np.ascontiguousarray(pair.a).data)
        digest.update(np.ascontiguousarray(pair.b).data)
    return digest.hexdigest()
