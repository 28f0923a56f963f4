"""Durable writes: order of calls, every operation failing in turn, and leftovers swept."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmserve import durable, failpoints
from llmserve.durable import StagedFolder, sweep_stale, verify_manifest, write_bytes, write_json
from llmserve.errors import ConfigError, LLMServeError

OLD = {"config.json": b"old config", "model.safetensors": b"old weights"}
NEW = {"config.json": b"new config", "model.safetensors": b"new weights", "sub/log.jsonl": b"{}\n"}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls that durability depends on, in their order."""
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        size = "" if path.is_dir() else f" {path.stat().st_size} bytes"
        seen.append(f"fsync {'folder' if path.is_dir() else 'file'}{size}")
        real_fsync(descriptor)

    def replace(source: str | Path, target: str | Path) -> None:
        seen.append(f"rename to {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def stage(target: Path, files: dict[str, bytes], *, overwrite: bool = False) -> None:
    with StagedFolder(target, overwrite=overwrite) as staged:
        for name, data in files.items():
            (staged.path / name).parent.mkdir(exist_ok=True)
            write_bytes(staged.path / name, data)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def count_operations(action: Callable[[], None]) -> int:
    failpoints.arm("durable.op=raise@999999")
    action()
    hits = failpoints._armed["durable.op"].hits
    failpoints.disarm_all()
    return hits


def test_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, calls: list[str]
) -> None:
    write_bytes(tmp_path / "a.bin", b"12345")
    assert calls == ["fsync file 5 bytes", "rename to a.bin", "fsync folder"]
    assert os.listdir(tmp_path) == ["a.bin"]


def test_folder_is_synced_inside_out_then_listed_then_renamed(
    tmp_path: Path, calls: list[str]
) -> None:
    with StagedFolder(tmp_path / "model") as staged:
        (staged.path / "plain.txt").write_bytes(b"123")
        assert not (tmp_path / "model").exists()
    assert calls == [
        "fsync file 3 bytes",
        "fsync folder",
        f"fsync file {(tmp_path / 'model/manifest.json').stat().st_size} bytes",
        "rename to manifest.json",
        "fsync folder",
        "rename to model",
        "fsync folder",
    ]


def test_json_keeps_its_order_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": ["é"]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("action", ["raise", "enospc"])
def test_any_failing_operation_leaves_the_old_or_the_new_file(tmp_path: Path, action: str) -> None:
    path = tmp_path / "a.bin"

    def write() -> None:
        write_bytes(path, b"new")

    outcomes = set()
    for turn in range(1, count_operations(write) + 1):
        path.write_bytes(b"old")
        failpoints.arm(f"durable.op={action}@{turn}")
        with pytest.raises((LLMServeError, OSError)):
            write()
        outcomes.add(path.read_bytes())
        assert os.listdir(tmp_path) == ["a.bin"]
    assert outcomes == {b"old", b"new"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("action", ["raise", "enospc"])
def test_any_failing_operation_leaves_the_old_or_the_new_folder(
    tmp_path: Path, action: str, overwrite: bool
) -> None:
    if overwrite:
        stage(tmp_path / "count", OLD)
    total = count_operations(lambda: stage(tmp_path / "count", NEW, overwrite=overwrite))
    outcomes = []
    for turn in range(1, total + 1):
        parent = tmp_path / str(turn)
        if overwrite:
            stage(parent / "model", OLD)
        failpoints.arm(f"durable.op={action}@{turn}")
        with pytest.raises((LLMServeError, OSError)):
            stage(parent / "model", NEW, overwrite=overwrite)
        failpoints.disarm_all()
        left = sorted(os.listdir(parent))
        assert left == (["model"] if overwrite or left else [])
        if left:
            verify_manifest(parent / "model")
            outcomes.append(content(parent / "model"))
    assert all(outcome in (OLD, NEW) for outcome in outcomes)
    assert NEW in outcomes
    assert (OLD in outcomes) == overwrite


def test_full_disk_is_an_oserror_and_the_target_stays(tmp_path: Path) -> None:
    stage(tmp_path / "model", OLD)
    failpoints.arm("ckpt.write=enospc")
    with pytest.raises(OSError, match="No space left") as caught:
        stage(tmp_path / "model", NEW, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert content(tmp_path / "model") == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_interrupt_inside_the_block_removes_what_was_written(tmp_path: Path) -> None:
    def write_half() -> None:
        with StagedFolder(tmp_path / "model") as staged:
            (staged.path / "half").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    stage(tmp_path / "model", OLD)
    with pytest.raises(ConfigError, match="not empty"):
        StagedFolder(tmp_path / "model")
    stage(tmp_path / "model", NEW, overwrite=True)
    assert content(tmp_path / "model") == NEW
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a folder"):
        StagedFolder(tmp_path / "file", overwrite=True)


def test_parent_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file"):
        StagedFolder(tmp_path / "file" / "model")


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    stage(tmp_path / "model", NEW)
    assert content(tmp_path / "model") == NEW


def run_killed(tmp_path: Path, turn: int) -> int:
    """Overwrite `model` in a process of its own that is killed at its n-th operation."""
    code = (
        "import sys; from pathlib import Path; from llmserve.durable import StagedFolder\n"
        "with StagedFolder(Path(sys.argv[1]), overwrite=True) as staged:\n"
        "    (staged.path / 'config.json').write_bytes(b'new config')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        env={**os.environ, failpoints.VARIABLE: f"durable.op=kill@{turn}"},
        capture_output=True,
        check=False,
    ).returncode


def test_killed_process_leaves_old_or_new_once_swept(tmp_path: Path) -> None:
    outcomes = set()
    turn = 0
    while True:
        turn += 1
        stage(tmp_path / "model", {"config.json": b"old config"}, overwrite=True)
        code = run_killed(tmp_path, turn)
        sweep_stale(tmp_path, "model")
        assert os.listdir(tmp_path) == ["model"]
        verify_manifest(tmp_path / "model")
        outcomes.add((tmp_path / "model/config.json").read_bytes())
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes == {b"old config", b"new config"}


def test_sweep_keeps_what_living_processes_write(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    (tmp_path / f".model.tmp-{dead}-0a").mkdir()
    (tmp_path / f".model.tmp-{'9' * 30}-0a").mkdir()
    (tmp_path / f".model.tmp-{os.getppid()}-0a").mkdir()
    (tmp_path / f".other.tmp-{dead}-0a").mkdir()
    (tmp_path / f".model.tmp-{os.getpid()}-0a").write_bytes(b"of an earlier process")
    with StagedFolder(tmp_path / "model") as staged:
        sweep_stale(tmp_path, "model")
        assert set(os.listdir(tmp_path)) == {
            f".model.tmp-{os.getppid()}-0a",
            f".other.tmp-{dead}-0a",
            staged.path.name,
        }


def test_append_line_is_flushed(tmp_path: Path) -> None:
    with open(tmp_path / "log.jsonl", "a") as file:
        durable.append_line(file, "{}")
        assert (tmp_path / "log.jsonl").read_text() == "{}\n"
    buffer = io.StringIO()
    durable.append_line(buffer, "a")
    assert buffer.getvalue() == "a\n"
