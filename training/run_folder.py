"""The folder of one training run: what is in it, who may write it, and its checkpoints.

    run.json                the recipe and the digests that a resumed run must agree with
    cleaning.json           what cleaning took from the text
    tokenizer/, tokens/     the text as numbers
    checkpoints/step-N/     a model folder, the optimizer's state and the place in the text
    checkpoints/last.json   which of them to go on from; best.json: lowest held-out loss
    training_log.jsonl      what was measured; tensorboard/: the same for TensorBoard
    training.html, loss.png the same to look at
    model/                  the finished model; result.json: its figures
    adapter/                of a fine-tuning with LoRA: its matrices alone; base/: what they fit,
                            where that was quantized for the run

Everything is written through `durable`, a checkpoint as one folder that appears whole; `last.json`
is moved to it after that, and older ones are deleted only then. A process killed at any moment
leaves a folder from which the next one goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llmserve.durable import StagedFolder, sweep_stale, verify_manifest, write_json
from llmserve.errors import ConfigError, TrainingError
from llmserve.lineage import TRAINING_LOG
from llmserve.strict_json import read_json

__all__ = ["RunFolder"]

_LOCK = "run.lock"
_RUN = "run.json"
_CONTENT = (
    "adapter",
    "base",
    "checkpoints",
    "cleaning.json",
    "loss.png",
    "model",
    "result.json",
    "tensorboard",
    "tokenizer",
    "tokens",
    "training.html",
    TRAINING_LOG,
)
_STEP = re.compile(r"\.?(step-\d{8,})")


class RunFolder:
    """Paths and pointers of one run. Use it inside `locked()`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """The folder itself."""
        self.cleaning = path / "cleaning.json"
        """What cleaning took."""
        self.tokenizer = path / "tokenizer"
        """Files of the tokenizer."""
        self.tokens = path / "tokens"
        """Token files."""
        self.log = path / TRAINING_LOG
        """The log."""
        self.picture = path / "loss.png"
        """The loss curve."""
        self.page = path / "training.html"
        """The page about the run."""
        self.tensorboard = path / "tensorboard"
        """Event files."""
        self.model = path / "model"
        """The finished model folder."""
        self.adapter = path / "adapter"
        """The finished LoRA adapter's folder."""
        self.base = path / "base"
        """The quantized model that the adapter was trained on."""
        self._checkpoints = path / "checkpoints"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it when the process ends.

        Where nothing came to be, as when the text is refused, the lock goes too, and a new folder.

        Raises:
            ConfigError: the folder cannot be made, or holds something else.
            TrainingError: another process trains in it.
        """
        is_new = not self.path.exists()
        with self._open_locked():
            self._sweep()
            try:
                yield
            finally:
                if [path.name for path in self.path.iterdir()] == [_LOCK]:
                    (self.path / _LOCK).unlink()
                    if is_new:
                        self.path.rmdir()

    def _open_locked(self) -> TextIO:
        """The lock's file, locked until it is closed."""
        while True:
            self._make()
            file = open(self.path / _LOCK, "a+", encoding="ascii")  # noqa: SIM115 - the caller's
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                raise TrainingError(
                    f"{self.path} is in use by another training (process {holder}); "
                    "wait for it, or give another --out"
                ) from error
            if os.fstat(file.fileno()).st_nlink:
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                return file
            file.close()  # who held it before has removed it: nobody else would find this one

    def failure(self, error: OSError) -> TrainingError:
        """What to tell of an operation on the disk that failed: its file, and what is kept."""
        name = f"{Path(str(error.filename)).name}: " if error.filename else ""
        kept = "the last checkpoint is kept" if self._pointed("last.json") else "no checkpoint yet"
        return TrainingError(
            f"{self.path}: {name}{error.strerror or error}; {kept}: run the same command again "
            "when this is mended"
        )

    def read_run(self) -> dict[str, Any] | None:
        """What `write_run` wrote; None in a new folder."""
        path = self.path / _RUN
        return read_json(path) if path.is_file() else None

    def write_run(self, run: dict[str, Any]) -> None:
        """Record what determines the run."""
        write_json(self.path / _RUN, run)

    def read_result(self) -> dict[str, Any] | None:
        """The finished run's figures; None before its end."""
        path = self.path / "result.json"
        return read_json(path) if path.is_file() else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Record that the run is finished."""
        write_json(self.path / "result.json", result)

    def clear(self) -> None:
        """Remove what an earlier run left. Its record goes first: a torn removal is no run."""
        (self.path / _RUN).unlink(missing_ok=True)
        for name in _CONTENT:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def new_checkpoint(
        self, step: int, *, keep: int, keep_every: int | None = None
    ) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; it becomes the last one.

        The `keep` newest, the best and those of steps that `keep_every` divides stay; others go,
        now that the new one is on the disk.
        """
        self._checkpoints.mkdir(exist_ok=True)
        name = f"step-{step:08d}"
        with StagedFolder(self._checkpoints / name, overwrite=True) as staged:
            yield staged.path
        write_json(self._checkpoints / "last.json", {"folder": name})
        self._retain(keep, keep_every)

    def mark_if_best(self, step: int, held_out_loss: float) -> None:
        """Point `best.json` at the checkpoint of `step` if none before had as low a loss."""
        path = self._checkpoints / "best.json"
        if path.is_file() and read_json(path)["held_out_loss"] <= held_out_loss:
            return
        write_json(path, {"folder": f"step-{step:08d}", "held_out_loss": held_out_loss})

    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, its files checked; None before the first.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._verified("best.json")

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, its files checked; None before the first.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._verified("last.json")

    def _verified(self, pointer: str) -> Path | None:
        path = self._pointed(pointer)
        if path is not None:
            verify_manifest(path)
        return path

    def _pointed(self, pointer: str) -> Path | None:
        path = self._checkpoints / pointer
        return self._checkpoints / str(read_json(path)["folder"]) if path.is_file() else None

    def _retain(self, keep: int, keep_every: int | None) -> None:
        folders = sorted(path for path in self._checkpoints.glob("step-*") if path.is_dir())
        best = self._pointed("best.json")
        for path in folders[:-keep]:
            is_periodic = keep_every is not None and _step_of(path) % keep_every == 0
            if path != best and not is_periodic:
                shutil.rmtree(path)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be made: {error.strerror}") from error
        known = {_LOCK, _RUN, *_CONTENT}
        names = sorted(path.name for path in self.path.iterdir())
        others = [name for name in names if name not in known and not name.startswith(".")]
        if others and not (self.path / _RUN).is_file():
            raise ConfigError(
                f"{self.path} holds other files ({others[0]}); give a new folder as --out"
            )

    def _sweep(self) -> None:
        """Remove what a killed process was in the middle of writing."""
        for entry in self._checkpoints.iterdir() if self._checkpoints.is_dir() else ():
            match = _STEP.match(entry.name)
            if match and entry.name.startswith("."):
                sweep_stale(self._checkpoints, match[1])
        for name in (*_CONTENT, _RUN):
            sweep_stale(self.path, name)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
