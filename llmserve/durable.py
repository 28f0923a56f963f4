"""The one place that writes files which must survive: whole or not at all, after any crash.

A file is written under a temporary name beside its target, synced, renamed over the target, and
the folder synced; a model folder is built the same way as a whole (`StagedFolder`), with its
manifest written last. What can be found under the target's name is therefore always complete: the
old content or the new.

Temporary names are `.<name>.tmp-<pid>-<random>`; a folder that is being replaced is called
`.<name>.old-<pid>-<random>` for the moment between two renames. `sweep_stale` removes what dead
processes left, and brings such an old folder back if nothing took its place. It knows processes of
this machine only: do not write one folder from two machines at once.

Each primitive operation passes the failpoint `durable.op` and one of its own (`ckpt.open`,
`ckpt.write`, `ckpt.fsync`, `ckpt.rename`, `ckpt.unlink`), so that tests fail every one in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TextIO

from . import failpoints
from .errors import ConfigError
from .manifest import MANIFEST, render_manifest, verify_manifest

__all__ = [
    "StagedFolder",
    "append_bytes",
    "append_line",
    "remove",
    "staged_file",
    "sweep_stale",
    "verify_manifest",
    "write_bytes",
    "write_chunks",
    "write_json",
    "write_manifest",
    "write_synced",
]

# Temporary names of this process that are still wanted: others with its pid are leftovers of an
# earlier process that had the same one (in a container it often has).
_live: set[str] = set()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` by one that holds `data`. Raises `OSError`; the old file stays."""
    write_chunks(path, (data,))


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON in the order given. NaN and infinity raise `ValueError`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """`write_bytes` for content that is too large to be held at once."""
    with staged_file(path) as temporary:
        write_synced(temporary, chunks)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A hidden sibling of `path`, for content that is examined before it appears.

    Write it with `write_synced`; leaving the block puts it in the place of `path`, leaving it by an
    exception removes it, and the old file stays.
    """
    sweep_stale(path.parent, path.name)
    temporary = _reserve(path, "tmp")
    try:
        with _naming(path):
            yield temporary
        _rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        remove(temporary)
        raise
    finally:
        _live.discard(temporary.name)


@contextlib.contextmanager
def _naming(path: str | Path | None) -> Iterator[None]:
    """Have errors say which file it was: those of a write, unlike those of opening, do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and path is not None:
            error.filename = str(path)
        raise


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the list of all other files of `folder` with size and sha256."""
    write_bytes(folder / MANIFEST, render_manifest(folder))


def append_line(file: TextIO, text: str) -> None:
    """Append one line to an open log: one write, flushed, so that a crash tears only the last."""
    with _naming(getattr(file, "name", None)):
        file.write(f"{text}\n")
        file.flush()


def append_bytes(file: BinaryIO, data: bytes) -> None:
    """Append a record to an open file of records: one write, flushed, as `append_line`."""
    with _naming(getattr(file, "name", None)):
        file.write(data)
        file.flush()


class StagedFolder:
    """A folder that appears under its name at once, complete and with its manifest, or not at all.

        with StagedFolder(target) as staged:
            write_bytes(staged.path / "config.json", data)

    Leaving the block syncs every file, writes `manifest.json` and renames; leaving it by an
    exception removes what was written and leaves the target as it was.
    """

    def __init__(self, target: Path, *, overwrite: bool = False) -> None:
        """Reserve a hidden sibling of `target` to write into; leftovers of dead runs go.

        Raises:
            ConfigError: `target` is a file, or a folder with files in it and not `overwrite`, or
                its parent cannot be made.
        """
        self._target = target.absolute()
        self._overwrite = overwrite
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{target.parent}: cannot be made: {error.strerror}") from error
        sweep_stale(self._target.parent, self._target.name)
        self._check_target()
        self.path = _reserve(self._target, "tmp")
        """Where the files are to be written."""

    def __enter__(self) -> StagedFolder:
        try:
            _operation("ckpt.open")
            self.path.mkdir()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _check_target(self) -> None:
        target = self._target
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ConfigError(f"{target} exists and is not a folder; give another name")
        if not self._overwrite and target.is_dir() and any(target.iterdir()):
            raise ConfigError(
                f"{target} exists and is not empty; give another name, or ask to overwrite it"
            )

    def _commit(self) -> None:
        for folder, _, names in os.walk(self.path, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        write_manifest(self.path)
        self._check_target()
        if self._target.exists():
            self._replace()
        else:
            _rename(self.path, self._target)
            _sync(self._target.parent)

    def _replace(self) -> None:
        old = _reserve(self._target, "old")
        try:
            _rename(self._target, old)
            _rename(self.path, self._target)
            _sync(self._target.parent)
        finally:
            if not self._target.exists():
                os.rename(old, self._target)
            _live.discard(old.name)
            remove(old)

    def _discard(self) -> None:
        remove(self.path)
        _live.discard(self.path.name)


def sweep_stale(parent: Path, name: str) -> None:
    """Remove what processes that no longer run left while they wrote `parent/name`.

    An old folder that was set aside is brought back if its replacement never arrived.
    """
    for kind in ("old", "tmp"):
        pattern = re.compile(rf"\.{re.escape(name)}\.{kind}-([1-9][0-9]*)-[0-9a-f]+")
        for entry in sorted(parent.iterdir()) if parent.is_dir() else []:
            match = pattern.fullmatch(entry.name)
            if match is None or _is_wanted(entry, int(match[1])):
                continue
            if kind == "old" and not (parent / name).exists():
                _rename(entry, parent / name)
            else:
                remove(entry)


def _is_wanted(path: Path, pid: int) -> bool:
    if pid == os.getpid():
        return path.name in _live
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _reserve(path: Path, kind: str) -> Path:
    """A new hidden name beside `path`."""
    name = f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"
    reserved = path.absolute().with_name(name)
    _live.add(reserved.name)
    return reserved


def _operation(name: str) -> None:
    failpoints.hit("durable.op")
    failpoints.hit(name)


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file and wait until it is on the disk. For the block of `staged_file`."""
    _operation("ckpt.open")
    with open(path, "xb") as file:
        for chunk in chunks:
            _operation("ckpt.write")
            file.write(chunk)
        file.flush()
        _operation("ckpt.fsync")
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Wait until a file's data, or a folder's entries, are on the disk."""
    with _naming(path):
        _operation("ckpt.fsync")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    with _naming(target):
        _operation("ckpt.rename")
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there, as far as that can be done."""
    if not path.exists():
        return
    try:
        _operation("ckpt.unlink")
    finally:  # an interrupt must not leave it behind
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
