"""The manifest finds every damaged byte and every truncation, and names the file."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest

from llmserve.durable import verify_manifest, write_manifest
from llmserve.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_bytes(b'{"a": 1}\n')
    (tmp_path / "sub/data.bin").write_bytes(bytes(range(64)))
    write_manifest(tmp_path)
    return tmp_path


def test_untouched_folder_passes_and_lists_everything_else(folder: Path) -> None:
    (folder / "certificate.json").write_text("{}")
    verify_manifest(folder)
    write_manifest(folder)
    verify_manifest(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert list(files) == ["config.json", "sub/data.bin"]
    assert files["sub/data.bin"]["bytes"] == 64


def test_unlisted_file_is_ignored(folder: Path) -> None:
    (folder / "extra.txt").write_text("x")
    verify_manifest(folder)


def test_missing_manifest_is_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "manifest.json").unlink()
    verify_manifest(folder)
    assert [(record.name, record.levelno) for record in caplog.records] == [
        ("llmserve", logging.WARNING)
    ]


def test_missing_file_is_named(folder: Path) -> None:
    (folder / "sub/data.bin").unlink()
    with pytest.raises(CheckpointError, match=r"data\.bin: missing"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["config.json", "sub/data.bin", "manifest.json"])
def test_every_flipped_byte_is_found(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    generator = random.Random(name)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= generator.randrange(1, 256)
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            verify_manifest(folder)
        assert Path(name).name in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "sub/data.bin", "manifest.json"])
def test_every_truncation_is_found(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for length in range(len(data)):
        (folder / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            verify_manifest(folder)
        assert Path(name).name in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "a\0b"])
def test_name_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "00"}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_manifest(folder)


@pytest.mark.parametrize("files", [[], None, {"config.json": None}, {"config.json": {"bytes": 9}}])
def test_wrongly_shaped_manifest_is_refused(folder: Path, files: object) -> None:
    manifest = {"format": "llmserve-manifest-1", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(CheckpointError, match="manifest"):
        verify_manifest(folder)
