"""Damage of any byte of any file of a folder with manifest is found, and the file named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import CheckpointError
from support.variants import LLAMA, random_tensors

FILES = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "model"
    tokenizer = {"tokenizer.json": b'{"version": "1.0", "model": {"type": "WordLevel"}}\n' * 20}
    save_model(folder, LLAMA, random_tensors(LLAMA), extra_files=tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return folder


@pytest.fixture
def intact(model: Path) -> Iterator[Path]:
    """The folder, put right again afterwards."""
    before = {name: (model / name).read_bytes() for name in FILES}
    yield model
    for name, data in before.items():
        (model / name).write_bytes(data)
    Checkpoint.open(model)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_are_found(intact: Path, name: str) -> None:
    data = (intact / name).read_bytes()
    generator = random.Random(f"flip {name}")
    for _ in range(200):
        place = generator.randrange(len(data))
        damaged = bytearray(data)
        damaged[place] ^= generator.randrange(1, 256)
        (intact / name).write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(intact)
        assert name in str(caught.value), f"byte {place}"


@pytest.mark.parametrize("name", FILES)
def test_truncations_are_found(intact: Path, name: str) -> None:
    data = (intact / name).read_bytes()
    generator = random.Random(f"cut {name}")
    for _ in range(50):
        length = generator.randrange(len(data))
        (intact / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(intact)
        assert name in str(caught.value), f"{length} bytes left"


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_missing_file_is_found(intact: Path, name: str) -> None:
    (intact / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint.open(intact)
