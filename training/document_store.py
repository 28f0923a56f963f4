"""Documents of a corpus on disk, so that it may be far larger than memory.

While a corpus is cleaned, compared and split its texts lie in a temporary file without a name,
which is gone with the process; in memory are 8 bytes for each. The file is in the system's folder
for such files, which the environment variable TMPDIR changes.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from llmserve.errors import DataError

__all__ = ["ChosenDocuments", "DocumentStore"]


class _Documents(Sequence[str]):
    """What both kinds share: slices are read into memory."""

    @abstractmethod
    def _read(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]
        return (
            [self._read(place) for place in places]
            if isinstance(places, range)
            else self._read(places)
        )

    def __iter__(self) -> Iterator[str]:
        return map(self._read, range(len(self)))


class DocumentStore(_Documents):
    """Texts in the order in which they were added."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Begin with `texts`, which are read once."""
        self._file = tempfile.TemporaryFile(prefix="llmserve-")  # noqa: SIM115 - lives as this does
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._is_written = True
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text. Raises `DataError` where the disk has no room for it."""
        data = text.encode()
        try:
            self._file.write(data)
        except OSError as error:
            raise _no_room(error) from error
        self._ends.append(self._ends[-1] + len(data))
        self._is_written = False

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _read(self, index: int) -> str:
        if not self._is_written:
            try:
                self._file.flush()
            except OSError as error:
                raise _no_room(error) from error
            self._is_written = True
        start, end = self._ends[index], self._ends[index + 1]
        data = b""
        while len(data) < end - start:  # one read gives 2 GiB at most
            data += os.pread(self._file.fileno(), end - start - len(data), start + len(data))
        return data.decode()


class ChosenDocuments(_Documents):
    """Some of other documents, in an order of their own."""

    def __init__(self, documents: Sequence[str], indices: Iterable[int]) -> None:
        """`indices` are places in `documents`."""
        self._documents, self._indices = documents, array("q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def _read(self, index: int) -> str:
        return self._documents[self._indices[index]]


def _no_room(error: OSError) -> DataError:
    return DataError(
        f"{tempfile.gettempdir()}: cannot hold the text while it is prepared: {error.strerror}; "
        "make room, or let the environment variable TMPDIR name another folder"
    )
