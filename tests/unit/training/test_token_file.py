"""Token files come back as they were written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.errors import DataError
from llmserve.training.token_file import TokenFile, write_token_file

IDS = np.arange(1000) % 300


def write(path: Path, ids: Any = IDS, vocab_size: int = 300) -> Path:
    write_token_file(
        path,
        np.asarray(ids),
        vocab_size=vocab_size,
        tokenizer_sha256="t",
        text_sha256="d",
        text_bytes=5,
    )
    return path


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(300, 2), (65_536, 2), (65_537, 4)])
def test_round_trip(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    file = TokenFile.open(write(tmp_path / "t.bin", vocab_size=vocab_size))
    assert file.ids.itemsize == itemsize
    assert np.array_equal(file.ids, IDS)
    assert (file.tokenizer_sha256, file.text_sha256, file.text_bytes) == ("t", "d", 5)
    assert not file.ids.flags.writeable


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    for ids in ([300], [-1]):
        with pytest.raises(DataError, match="vocabulary of 300"):
            write(tmp_path / "t.bin", ids)


@pytest.mark.parametrize("place", [0, 1, 999, 1998])
def test_flipped_bit_is_found(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "t.bin")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"t\.bin"):
        TokenFile.open(path)


def test_id_outside_the_vocabulary_is_found_whatever_the_digest_says(tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin")
    sidecar = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"vocab_size": 299}))
    with pytest.raises(DataError, match="outside the vocabulary"):
        TokenFile.open(path)


@pytest.mark.parametrize("keep", [0, 1, 1999])
def test_torn_file_is_found(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "t.bin")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="torn"):
        TokenFile.open(path)


@pytest.mark.parametrize("content", ["{", "{}", '{"format": "other"}', "[]"])
def test_bad_description_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "t.bin")
    path.with_suffix(".json").write_text(content)
    with pytest.raises(DataError, match=r"t\.json"):
        TokenFile.open(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin")
    path.unlink()
    with pytest.raises(DataError, match=r"t\.bin"):
        TokenFile.open(path)
