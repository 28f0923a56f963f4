"""Token files come back as they were written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.errors import DataError
from llmserve.training import token_file
from llmserve.training.token_file import TokenFile, write_token_file
from llmserve.training.token_shards import ShardedIds

IDS = np.arange(1000) % 300
DOCUMENTS = np.split(IDS, [1, 300, 301, 777])


def write(path: Path, documents: Any = DOCUMENTS, vocab_size: int = 300) -> Path:
    write_token_file(
        path,
        [np.asarray(ids) for ids in documents],
        vocab_size=vocab_size,
        tokenizer_sha256="t",
        text_sha256="d",
        text_bytes=5,
    )
    return path


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The description of a text in shards of 128 ids."""
    monkeypatch.setattr(token_file, "SHARD_IDS", 128)
    return write(tmp_path / "t.json")


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(300, 2), (65_536, 2), (65_537, 4)])
def test_round_trip(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    file = TokenFile.open(write(tmp_path / "t.json", vocab_size=vocab_size))
    assert isinstance(file.ids, np.memmap)
    assert file.ids.itemsize == itemsize
    assert np.array_equal(file.ids, IDS)
    assert file.document_starts.tolist() == [0, 1, 300, 301, 777]
    assert (file.tokenizer_sha256, file.text_sha256, file.text_bytes) == ("t", "d", 5)
    assert not file.ids.flags.writeable


def test_shards_are_read_as_one(tmp_path: Path, shards: Path) -> None:
    names = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert names == [*(f"t-0000{i}.bin" for i in range(8)), "t.documents.bin"]
    file = TokenFile.open(shards)
    assert isinstance(file.ids, ShardedIds)
    assert len(file.ids) == 1000
    for start, stop in (
        (0, 1000),
        (0, 128),
        (127, 129),
        (128, 128),
        (5, 900),
        (990, 2000),
        (-3, None),
    ):
        assert np.array_equal(file.ids[start:stop], IDS[start:stop])
    assert np.array_equal(np.asarray(file.ids), IDS)
    assert np.array_equal(np.bincount(file.ids), np.bincount(IDS))
    with pytest.raises(ValueError, match="steps of 1"):
        file.ids[::2]


def test_digest_does_not_depend_on_the_shards(tmp_path: Path, shards: Path) -> None:
    digest = TokenFile.open(shards).sha256
    token_file.SHARD_IDS = 500  # the fixture's patch puts back what was there
    assert TokenFile.open(write(tmp_path / "u.json")).sha256 == digest


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    for ids in ([300], [-1]):
        with pytest.raises(DataError, match="vocabulary of 300"):
            write(tmp_path / "t.json", [ids])


@pytest.mark.parametrize("name", ["t-00000.bin", "t-00007.bin", "t.documents.bin"])
@pytest.mark.parametrize("place", [0, 15, -1])
def test_flipped_bit_is_found_and_the_file_named(
    tmp_path: Path, shards: Path, name: str, place: int
) -> None:
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=name):
        TokenFile.open(shards)


def test_shards_that_changed_places_are_found(tmp_path: Path, shards: Path) -> None:
    described = json.loads(shards.read_text())
    described["shards"].reverse()
    shards.write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"t\.json"):
        TokenFile.open(shards)


def test_id_outside_the_vocabulary_is_found_whatever_the_digest_says(shards: Path) -> None:
    described = json.loads(shards.read_text())
    shards.write_text(json.dumps(described | {"vocab_size": 299}))
    with pytest.raises(DataError, match="outside the vocabulary"):
        TokenFile.open(shards)


@pytest.mark.parametrize("name", ["t-00001.bin", "t.documents.bin"])
@pytest.mark.parametrize("keep", [0, 1, 255])
def test_torn_or_missing_file_is_found(tmp_path: Path, shards: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:keep])
    if path.stat().st_size != 40:
        with pytest.raises(DataError, match=name):
            TokenFile.open(shards)
    path.unlink()
    with pytest.raises(DataError, match=name):
        TokenFile.open(shards)


@pytest.mark.parametrize("content", ["{", "{}", '{"format": "other"}', "[]"])
def test_bad_description_is_refused(shards: Path, content: str) -> None:
    shards.write_text(content)
    with pytest.raises(DataError, match=r"t\.json"):
        TokenFile.open(shards)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": []},
        {"shards": [{"name": "../t-00000.bin", "count": 128, "sha256": ""}]},
        {"shards": [{"name": 3, "count": 128, "sha256": ""}]},
        {"shards": [{"count": 128}]},
        {"vocab_size": "300"},
        {"count": 999},
        {"more": 1},
    ],
)
def test_description_that_does_not_fit_is_refused(shards: Path, change: dict[str, Any]) -> None:
    shards.write_text(json.dumps(json.loads(shards.read_text()) | change))
    with pytest.raises(DataError, match=r"t\.json"):
        TokenFile.open(shards)
