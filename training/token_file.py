"""Token files: a text as numbers on disk, mapped into memory, never read as a whole.

`<name>.json` says what they are. The ids lie in shards, `<name>-00000.bin` and so on,
little-endian, two bytes each (four where the vocabulary is larger than 65,536);
`<name>.documents.bin` holds the offset at which each document begins, eight bytes each. Every file
is checked before the first use, and named if it is at fault: a flipped bit would otherwise train on
noise, or read outside the embedding.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.durable import write_bytes, write_json
from llmserve.errors import CheckpointError, DataError
from llmserve.strict_json import read_json

from .token_shards import ShardedIds

__all__ = ["TokenFile", "write_token_file"]

SHARD_IDS = 1 << 26
"""Ids of one shard."""

_FORMAT = "llmserve-tokens-2"
_CHUNK = 1 << 22
"""Ids checked at a time."""

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    name: str
    count: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description:
    format: str
    dtype: str
    count: int
    vocab_size: int
    shards: list[_Shard]
    documents: _Shard
    sha256: str
    tokenizer_sha256: str
    text_sha256: str
    text_bytes: int


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A checked token file. `ids` is read-only and mapped; slices of it are small copies."""

    ids: Ids | ShardedIds
    document_starts: npt.NDArray[np.int64]
    """Offsets at which documents begin, ascending from 0."""
    sha256: str
    """Digest of the ids' bytes, whatever shards they lie in."""
    tokenizer_sha256: str
    """Digest of the tokenizer that made them."""
    text_sha256: str
    """Digest of the documents they were made from."""
    text_bytes: int
    """UTF-8 bytes of those documents."""

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map and check the files described at `path` (`.json`). Reads them once.

        Raises:
            DataError: one is missing, torn, changed, or has an id outside its vocabulary.
        """
        described = _read_description(path)
        shards = [_map(path.parent, shard, described.dtype) for shard in described.shards]
        digest = hashlib.sha256()
        for shard, ids in zip(described.shards, shards, strict=True):
            _check_ids(path.parent / shard.name, ids, shard, described.vocab_size, digest)
        if digest.hexdigest() != described.sha256 or described.count != sum(map(len, shards)):
            raise DataError(f"{path}: its shards are not the {described.count} ids it describes")
        return cls(
            shards[0] if len(shards) == 1 else ShardedIds(shards),
            _read_documents(path.parent, described),
            described.sha256,
            described.tokenizer_sha256,
            described.text_sha256,
            described.text_bytes,
        )


def write_token_file(
    path: Path,
    documents: Iterable[npt.NDArray[np.integer[Any]]],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    text_sha256: str,
    text_bytes: int,
) -> None:
    """Write the ids of `documents` in shards, and then `path` (`.json`), which describes them.

    One shard is in memory at a time. Raises `DataError` for an id outside the vocabulary.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    starts = array("q")
    digest = hashlib.sha256()
    shards = []
    pieces = _counted(path, documents, starts, vocab_size, dtype)
    for index, ids in enumerate(_in_shards(pieces)):
        digest.update(ids.data)
        shards.append(_write(path.with_name(f"{path.stem}-{index:05}.bin"), ids))
    offsets = np.array(starts, dtype="<i8")
    description = _Description(
        format=_FORMAT,
        dtype=dtype.str,
        count=sum(shard.count for shard in shards),
        vocab_size=vocab_size,
        shards=shards,
        documents=_write(path.with_name(f"{path.stem}.documents.bin"), offsets),
        sha256=digest.hexdigest(),
        tokenizer_sha256=tokenizer_sha256,
        text_sha256=text_sha256,
        text_bytes=text_bytes,
    )
    write_json(path, asdict(description))


def _counted(
    path: Path,
    documents: Iterable[npt.NDArray[np.integer[Any]]],
    starts: array[int],
    vocab_size: int,
    dtype: np.dtype[Any],
) -> Iterator[Ids]:
    """The documents as they are stored; adds the offset of each to `starts`."""
    count = 0
    for ids in documents:
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise DataError(f"{path}: token ids outside the vocabulary of {vocab_size}")
        starts.append(count)
        count += len(ids)
        yield ids.astype(dtype)


def _in_shards(pieces: Iterable[Ids]) -> Iterator[Ids]:
    """All ids in arrays of `SHARD_IDS`, the last one shorter."""
    held: list[Ids] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        while count >= SHARD_IDS:
            ids = np.concatenate(held)
            yield ids[:SHARD_IDS]
            held, count = [ids[SHARD_IDS:]], count - SHARD_IDS
    if count:
        yield np.concatenate(held)


def _write(path: Path, array: npt.NDArray[Any]) -> _Shard:
    write_bytes(path, array.tobytes())
    return _Shard(name=path.name, count=len(array), sha256=hashlib.sha256(array.data).hexdigest())


def _read_description(path: Path) -> _Description:
    try:
        values = read_json(path)
        if values.get("format") != _FORMAT or values.get("dtype") not in ("<u2", "<u4"):
            raise DataError(f"{path}: not a token file of this program's format {_FORMAT}")
        shards = [_Shard(**shard) for shard in values["shards"]]
        documents = _Shard(**values["documents"])
        described = _Description(**{**values, "shards": shards, "documents": documents})
    except (CheckpointError, TypeError, KeyError) as error:
        raise DataError(f"{path}: no description of a token file: {error}") from error
    files = (*described.shards, described.documents)
    numbers = (described.count, described.vocab_size, *(file.count for file in files))
    if not shards or any(Path(str(file.name)).name != file.name for file in files):
        raise DataError(f"{path}: names no files beside it")
    if not all(isinstance(number, int) for number in numbers):
        raise DataError(f"{path}: its counts are no numbers")
    return described


def _map(folder: Path, shard: _Shard, dtype: str) -> npt.NDArray[Any]:
    path = folder / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if size != shard.count * np.dtype(dtype).itemsize or size == 0:
        raise DataError(f"{path}: has {size} bytes, not {shard.count} numbers: torn or changed")
    return np.memmap(path, dtype=dtype, mode="r")


def _check_ids(path: Path, ids: Ids, shard: _Shard, vocab_size: int, whole: Any) -> None:
    digest = hashlib.sha256()
    for start in range(0, len(ids), _CHUNK):
        chunk = np.ascontiguousarray(ids[start : start + _CHUNK])
        digest.update(chunk.data)
        whole.update(chunk.data)
        if int(chunk.max()) >= vocab_size:
            raise DataError(f"{path}: an id is outside the vocabulary of {vocab_size}")
    if digest.hexdigest() != shard.sha256:
        raise DataError(f"{path}: its sha256 differs from its description: damaged or changed")


def _read_documents(folder: Path, described: _Description) -> npt.NDArray[np.int64]:
    starts = np.array(_map(folder, described.documents, "<i8"))
    is_same = hashlib.sha256(starts.data).hexdigest() == described.documents.sha256
    is_ascending = starts[0] == 0 and bool((np.diff(starts) >= 0).all())
    if not is_same or not is_ascending or starts[-1] > described.count:
        raise DataError(
            f"{folder / described.documents.name}: its sha256 differs from its description: "
            "damaged or changed"
        )
    return starts
