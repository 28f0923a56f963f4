"""The run's folder: one writer, whole checkpoints, the right ones kept."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from llmserve.durable import write_bytes
from llmserve.errors import CheckpointError, ConfigError, TrainingError
from llmserve.training.run_folder import RunFolder


def save(folder: RunFolder, step: int, *, keep: int = 2) -> None:
    with folder.new_checkpoint(step, keep=keep) as path:
        write_bytes(path / "data", str(step).encode())


def steps(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").glob("step-*"))


def test_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, loss in ((1, 5.0), (2, 3.0), (3, 3.0), (4, 4.0), (5, 3.5)):
        save(folder, step)
        folder.mark_if_best(step, loss)
    assert steps(folder) == ["step-00000002", "step-00000004", "step-00000005"]
    last = folder.last_checkpoint()
    assert last is not None
    assert (last / "data").read_text() == "5"


def test_checkpoints_of_some_steps_are_kept_for_good(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 8):
        with folder.new_checkpoint(step, keep=1, keep_every=3) as path:
            write_bytes(path / "data", b"")
    assert steps(folder) == ["step-00000003", "step-00000006", "step-00000007"]


def test_failed_checkpoint_leaves_the_last_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 1)
    with pytest.raises(ZeroDivisionError), folder.new_checkpoint(2, keep=1):
        _ = 1 / 0
    last = folder.last_checkpoint()
    assert last is not None
    assert last.name == "step-00000001"
    assert steps(folder) == ["step-00000001"]


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    save(folder, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "data").write_text("2")
    with pytest.raises(CheckpointError, match="data"):
        folder.last_checkpoint()


def test_second_trainer_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(TrainingError, match=f"process {os.getpid()}"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    with RunFolder(tmp_path).locked():
        pass


def test_a_folder_in_which_nothing_came_to_be_is_gone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        with pytest.raises(KeyError), RunFolder(tmp_path / name).locked():
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_lock_that_another_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock, calls = tmp_path / "run.lock", fcntl.flock, []

    def after_removal(file: TextIO, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with RunFolder(tmp_path).locked():
        assert lock.read_text() == f"{os.getpid()}\n"
        with pytest.raises(TrainingError, match="in use"), RunFolder(tmp_path).locked():
            pass
    assert len(calls) == 3


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from llmserve.training.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).locked():\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    with RunFolder(tmp_path).locked():
        pass


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    leftovers = [
        tmp_path / "checkpoints" / f".step-00000007.tmp-{dead}-0a1b2c3d",
        tmp_path / f".model.tmp-{dead}-0a1b2c3d",
    ]
    for path in leftovers:
        path.mkdir(parents=True)
        (path / "half").write_text("written")
    with RunFolder(tmp_path).locked():
        assert not any(path.exists() for path in leftovers)


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"), RunFolder(tmp_path).locked():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError), RunFolder(tmp_path / "file").locked():
        pass


def test_clearing_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.write_run({"format": "x"})
        save(folder, 1)
        folder.write_result({"loss": 1.0})
        (tmp_path / "notes.txt").write_text("mine")
        folder.clear()
    assert folder.read_run() is None
    assert folder.read_result() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.lock"]
