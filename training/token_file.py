"""Token files: a text as numbers on disk, mapped into memory, never read as a whole.

`<name>.bin` holds the ids, little-endian, two bytes each (four where the vocabulary is larger than
65,536); `<name>.json` beside it says what they are. The ids are checked before the first use: a
flipped bit would otherwise train on noise, or read outside the embedding.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.durable import write_bytes, write_json
from llmserve.errors import CheckpointError, DataError
from llmserve.strict_json import read_json

__all__ = ["TokenFile", "write_token_file"]

_FORMAT = "llmserve-tokens-1"
_CHUNK = 1 << 22
"""Ids checked at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sidecar:
    format: str
    dtype: str
    count: int
    vocab_size: int
    sha256: str
    tokenizer_sha256: str
    text_sha256: str
    text_bytes: int


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A checked token file. `ids` is read-only and mapped; slices of it are small copies."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    sha256: str
    """Digest of the ids' bytes."""
    tokenizer_sha256: str
    """Digest of the tokenizer that made them."""
    text_sha256: str
    """Digest of the documents they were made from."""
    text_bytes: int
    """UTF-8 bytes of those documents."""

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map and check the file at `path` (`.bin`). Reads it once.

        Raises:
            DataError: missing, torn, changed, or with an id outside its vocabulary.
        """
        sidecar = _read_sidecar(path.with_suffix(".json"))
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if size != sidecar.count * np.dtype(sidecar.dtype).itemsize or size == 0:
            raise DataError(f"{path}: has {size} bytes, not {sidecar.count} ids: torn or changed")
        ids = np.memmap(path, dtype=sidecar.dtype, mode="r")
        _check(path, ids, sidecar)
        return cls(
            ids,
            sidecar.sha256,
            sidecar.tokenizer_sha256,
            sidecar.text_sha256,
            sidecar.text_bytes,
        )


def write_token_file(
    path: Path,
    ids: npt.NDArray[np.integer[Any]],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    text_sha256: str,
    text_bytes: int,
) -> None:
    """Write `ids` to `path` (`.bin`) and the file beside it that describes them."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DataError(f"{path}: token ids outside the vocabulary of {vocab_size}")
    data = ids.astype("<u2" if vocab_size <= 1 << 16 else "<u4")
    sidecar = _Sidecar(
        format=_FORMAT,
        dtype=data.dtype.str,
        count=int(data.size),
        vocab_size=vocab_size,
        sha256=hashlib.sha256(data.data).hexdigest(),
        tokenizer_sha256=tokenizer_sha256,
        text_sha256=text_sha256,
        text_bytes=text_bytes,
    )
    write_bytes(path, data.tobytes())
    write_json(path.with_suffix(".json"), asdict(sidecar))


def _read_sidecar(path: Path) -> _Sidecar:
    try:
        sidecar = _Sidecar(**read_json(path))
    except (CheckpointError, TypeError) as error:
        raise DataError(f"{path}: no description of a token file: {error}") from error
    if sidecar.format != _FORMAT or sidecar.dtype not in ("<u2", "<u4"):
        raise DataError(f"{path}: not a token file of this program's format {_FORMAT}")
    return sidecar


def _check(path: Path, ids: npt.NDArray[np.unsignedinteger[Any]], sidecar: _Sidecar) -> None:
    digest = hashlib.sha256()
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        digest.update(np.ascontiguousarray(chunk).data)
        if int(chunk.max()) >= sidecar.vocab_size:
            raise DataError(f"{path}: an id is outside the vocabulary of {sidecar.vocab_size}")
    if digest.hexdigest() != sidecar.sha256:
        raise DataError(f"{path}: its sha256 differs from its description: damaged or changed")
