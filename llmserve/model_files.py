"""The files of a model folder that hold its weights, mapped; what is refused instead of opened.

A folder comes from anywhere, so nothing outside it is read by a name that it holds: a shard's name
is one plain word, and a symbolic link of that name must end in the folder itself or in the blobs
of the Hugging Face cache that the folder is a snapshot of. `config.json` and `model.safetensors`,
whose names are ours, may be links to anywhere. Hard links are ordinary files to us: whoever can
make one could have copied the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import CheckpointError
from .layouts import Family, is_ignored, stored_name
from .quant.dtypes import StoredArray
from .strict_json import read_json
from .tensor_file import map_tensors

__all__ = ["GRAPH_FILE", "Weights", "check_model_folder", "graph_in", "map_weights"]

GRAPH_FILE = "model.onnx"
"""An exported graph, in place of weights or, in a folder `onnx`, beside them."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_MAX_SHARDS = 1024
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_INSTEAD = "load it with the program that wrote it and save it again as safetensors"


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model folder by stored name (`layouts.Part`), as mapped views."""

    files: list[Path]
    """The safetensors files; of a folder with a graph instead, the graph's."""
    arrays: dict[str, StoredArray]
    """Stored name → values."""
    file_of: dict[str, Path]
    """Stored name → the file that holds it."""


def check_model_folder(path: Path) -> None:
    """Raise `CheckpointError`, naming path and cause, unless `path` is a folder with a config."""
    try:
        if path.is_dir():
            if not (path / "config.json").exists():
                raise CheckpointError(f"{path}: has no config.json, so it is no model folder")
            return
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not exists:
        raise CheckpointError(f"{path}: no such model folder")
    if path.suffix in _PICKLED:
        raise CheckpointError(f"{path}: pickled weights are never opened; {_INSTEAD}")
    raise CheckpointError(f"{path}: is a file; give the model folder that holds config.json")


def graph_in(folder: Path) -> Path | None:
    """The exported graph of a model folder, in it or in its folder `onnx`; None: it has none."""
    places = (folder / GRAPH_FILE, folder / "onnx" / GRAPH_FILE)
    return next((place for place in places if place.is_file()), None)


def map_weights(folder: Path, family: Family) -> Weights:
    """Map the weights of `folder`, one file or shards, leaving out what nobody needs.

    An exported folder, with a graph and no safetensors, has none to map.

    Raises:
        CheckpointError: no weights, pickled weights alone, an index that names a file that must
            not be opened, or shards that are damaged or do not hold what the index says.
    """
    if _is_exported(folder):
        return Weights(sorted(folder.glob(f"{GRAPH_FILE}*")), {}, {})
    files, shard_of = _weight_files(folder)
    weights = Weights(files, {}, {})
    for file in files:
        for name, array in map_tensors(file, ignore=partial(is_ignored, family=family)).items():
            if shard_of and shard_of.get(name) != file.name:
                raise CheckpointError(f"{file}: holds {name}, which the index places elsewhere")
            known = stored_name(name, family)
            if known in weights.arrays:
                raise CheckpointError(f"{file}: holds {known} twice, with and without its prefix")
            weights.arrays[known] = array
            weights.file_of[known] = file
    for name, shard in shard_of.items():
        if not is_ignored(name, family) and stored_name(name, family) not in weights.arrays:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing")
    return weights


def _is_exported(folder: Path) -> bool:
    has_weights = (folder / _WEIGHTS).exists() or (folder / _INDEX).exists()
    return (folder / GRAPH_FILE).is_file() and not has_weights


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and the index's shard of each tensor (empty without shards)."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS], {}
    if (folder / _INDEX).exists():
        shard_of = _read_index(folder / _INDEX)
        return [_shard(folder, name) for name in sorted(set(shard_of.values()))], shard_of
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: pickled weights are never opened; {_INSTEAD}"
        )
    raise CheckpointError(f"{folder}: has neither {_WEIGHTS} nor {_INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is no plain name of a safetensors file")
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise CheckpointError(f"{path}: more than {_MAX_SHARDS} shards")
    return weight_map


def _shard(folder: Path, name: str) -> Path:
    path = folder / name
    real_folder = folder.resolve()
    allowed = [real_folder]
    if real_folder.parent.name == "snapshots":
        allowed.append(real_folder.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise CheckpointError(f"{path}: is a link to a file outside the model folder")
    return path
