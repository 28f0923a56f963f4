"""Tensors that several processes share, on disk: a safetensors file from each, and an index.

    shard-00000-of-00002.safetensors   the rows that process 0 held, and what all had alike
    shard-00001-of-00002.safetensors   those of process 1
    shards.json                        which rows of each tensor are in which file

The index is plain JSON, so nothing is unpickled, and any number of processes reads what another
number wrote: each takes the rows that it needs from whichever files hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmserve.durable import write_json
from llmserve.errors import CheckpointError
from llmserve.model.weights import to_stored
from llmserve.quant.dtypes import StoredArray
from llmserve.strict_json import read_json
from llmserve.tensor_file import map_tensors, write_tensors

from .distributed import Processes
from .distributed_weights import is_part, local

__all__ = ["INDEX_NAME", "ShardedTensors", "write_shards"]

INDEX_NAME = "shards.json"
_FORMAT = "llmserve-shards-1"


def write_shards(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Write this process's part of `tensors`, and as the first one the index. All must call it."""
    own = {
        name: to_stored(local(tensor))
        for name, tensor in tensors.items()
        if processes.is_first or is_part(tensor)
    }
    files = [_file_name(rank, processes.count) for rank in range(processes.count)]
    write_tensors(folder / files[processes.rank], own)
    if processes.is_first:
        entries = {name: _entry(tensor, processes.count) for name, tensor in tensors.items()}
        write_json(folder / INDEX_NAME, {"format": _FORMAT, "files": files, "tensors": entries})


class ShardedTensors:
    """What `write_shards` wrote, mapped and not read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointError` for an index or a file that is missing or malformed."""
        self._path = folder / INDEX_NAME
        index = read_json(self._path)
        try:
            if index["format"] != _FORMAT:
                raise CheckpointError(f"{self._path}: is not of the format {_FORMAT}")
            self._entries = {str(name): _Entry(**entry) for name, entry in index["tensors"].items()}
            paths = [folder / Path(name).name for name in index["files"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path}: is no index of shards: {error}") from error
        self._files = [map_tensors(path) for path in paths]

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._entries.keys()

    def whole(self, name: str) -> Tensor:
        """All rows of a tensor."""
        entry = self._entry(name)
        if entry.rows is None:
            return torch.tensor(self._array(0, name).data)
        return self._rows(name, 0, entry.shape[0])

    def fill(self, name: str, target: Tensor, processes: Processes) -> None:
        """Copy into `target` the rows that this process holds of it."""
        if tuple(target.shape) != self._entry(name).shape:
            raise CheckpointError(f"{self._path}: {name} is not of the shape {list(target.shape)}")
        if is_part(target):
            start, stop = _rows_of(processes.rank, target.shape[0], processes.count)
            local(target).copy_(self._rows(name, start, stop))
        else:
            target.copy_(self.whole(name))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entry(name)
        parts = []
        for file, (first, last) in enumerate(entry.rows or ()):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                parts.append(
                    torch.tensor(self._array(file, name).data[begin - first : end - first])
                )
        rows = torch.cat(parts) if parts else torch.empty((0, *entry.shape[1:]))
        if len(rows) != stop - start:
            raise CheckpointError(f"{self._path}: rows {start} to {stop} of {name} are missing")
        return rows

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self._path}: holds no tensor {name}")
        return self._entries[name]

    def _array(self, file: int, name: str) -> StoredArray:
        if file >= len(self._files) or name not in self._files[file]:
            raise CheckpointError(f"{self._path}: {name} is not in the file that it names")
        return self._files[file][name]


class _Entry:
    """A tensor's shape, and from which to which row each file has it; None: the first has all."""

    def __init__(self, *, shape: list[int], rows: list[list[int]] | None) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.rows = None if rows is None else [(int(first), int(last)) for first, last in rows]


def _entry(tensor: Tensor, count: int) -> dict[str, Any]:
    rows = None
    if is_part(tensor):
        rows = [list(_rows_of(rank, tensor.shape[0], count)) for rank in range(count)]
    return {"shape": list(tensor.shape), "rows": rows}


def _rows_of(rank: int, rows: int, count: int) -> tuple[int, int]:
    """The rows that a process holds: equal parts, rounded up, as torch.chunk cuts them."""
    size = -(-rows // count)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def _file_name(rank: int, count: int) -> str:
    return f"shard-{rank:05d}-of-{count:05d}.safetensors"
