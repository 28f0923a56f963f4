"""One safetensors file in and out: mapped, not copied; checked before anything is believed.

The package safetensors judges the format (sizes, offsets, holes, overlaps, trailing bytes); what
it lets pass and should not is refused here before: headers above 16 MiB, names that occur twice,
what is no regular file. The arrays are views of the mapped file, read-only and not in memory until
they are touched; bfloat16 has no numpy type and comes as the bits (`quant.dtypes.StoredArray`).
Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .durable import write_chunks
from .errors import CheckpointError
from .quant.dtypes import NUMPY_DTYPES, StoredArray
from .strict_json import MAX_JSON_BYTES, parse_json

__all__ = ["drop_pages", "map_tensors", "read_metadata", "write_tensors"]

_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_PREFIX_BYTES = 8  # length of the header, little-endian
_METADATA = "__metadata__"


def map_tensors(
    path: Path, *, ignore: Callable[[str], bool] = lambda name: False
) -> dict[str, StoredArray]:
    """The tensors of the file at `path`, as read-only views of the mapped file.

    Args:
        path: A safetensors file. It must not be changed in place while the views are used.
        ignore: Names that are left out, whatever their type.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or has a tensor of another type than
            float32, float16, bfloat16, int64, int32, int8 and uint8.
    """
    header, start = _read_header(path)
    _check_format(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, entry in header.items():
        if name == _METADATA or ignore(name):
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has the type {entry['dtype']}, unknown here"
            )
        try:
            tensors[name] = _view(mapped, start, entry)
        except ValueError as error:  # numpy bounds even the shape of nothing
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The free texts in the header of the file at `path`. Raises `CheckpointError` as above."""
    header, _ = _read_header(path)
    _check_format(path)
    return dict(header.get(_METADATA) or {})


def write_tensors(
    path: Path, tensors: Mapping[str, StoredArray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file durably: the same tensors and metadata give the same bytes.

    Raises `OSError`; an older file at `path` stays.
    """
    # Wide types first: every tensor then begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].data.itemsize, name))
    header: dict[str, Any] = {_METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    write_chunks(path, _chunks(header, (tensors[name] for name in names)))


def _chunks(header: dict[str, Any], arrays: Iterator[StoredArray]) -> Iterator[bytes | memoryview]:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX_BYTES)
    yield len(text).to_bytes(_PREFIX_BYTES, "little") + text
    for array in arrays:
        if array.nbytes:
            yield np.ascontiguousarray(array.data).reshape(-1).view(np.uint8).data


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data begin."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
            if status.st_size < _PREFIX_BYTES or length > status.st_size - _PREFIX_BYTES:
                raise CheckpointError(
                    f"{path}: ends inside its header: torn, or no safetensors file"
                )
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: its header is larger than {MAX_JSON_BYTES} bytes")
            header = parse_json(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return header, _PREFIX_BYTES + length


def _check_format(path: Path) -> None:
    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a valid safetensors file: {error}") from error


def drop_pages(arrays: Iterable[StoredArray]) -> None:
    """Let go of what was read of the files behind mapped arrays: it is read again when needed.

    Who made a copy in a layout of its own does not need the file's pages beside it.
    """
    seen: set[int] = set()
    for array in arrays:
        base: object = array.data
        while isinstance(base, np.ndarray):
            base = base.base
        base = base.obj if isinstance(base, memoryview) else base
        if isinstance(base, mmap.mmap) and id(base) not in seen and hasattr(mmap, "MADV_DONTNEED"):
            seen.add(id(base))
            base.madvise(mmap.MADV_DONTNEED)


def _view(mapped: mmap.mmap, start: int, entry: dict[str, Any]) -> StoredArray:
    """One tensor, whose sizes and offsets the package has found to be right."""
    dtype = _DTYPES[entry["dtype"]]
    begin, _ = entry["data_offsets"]
    flat = np.frombuffer(mapped, NUMPY_DTYPES[dtype], math.prod(entry["shape"]), start + begin)
    return StoredArray(dtype, flat.reshape(entry["shape"]))
