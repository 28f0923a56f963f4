"""safetensors files: equal to the package's, mapped, and refused when malformed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as oracle

from llmserve.errors import CheckpointError
from llmserve.quant.dtypes import StoredArray, from_float32
from llmserve.tensor_file import map_tensors, read_metadata, write_tensors


@pytest.fixture
def tensors() -> dict[str, StoredArray]:
    generator = np.random.default_rng(0)
    return {
        "b": StoredArray("float32", generator.normal(size=(3, 5)).astype(np.float32)),
        "a": StoredArray("int8", generator.integers(-9, 9, (7,)).astype(np.int8)),
        "turned": StoredArray("float32", np.arange(6, dtype=np.float32).reshape(2, 3).T),
        "scalar": StoredArray("uint8", np.array(3, np.uint8)),
        "wide": StoredArray("int64", np.array([2**40, -1])),
        "half": from_float32(np.array([[1.5, -2.0]], np.float32), "bfloat16"),
        "empty": StoredArray("float16", np.empty((0, 4), np.float16)),
    }


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_round_trip_keeps_types_shapes_and_bits(
    tmp_path: Path, tensors: dict[str, StoredArray]
) -> None:
    write_tensors(tmp_path / "a.safetensors", tensors, {"note": "x"})
    read = map_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name].data, array.data)
        assert not read[name].data.flags.writeable
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt", "note": "x"}


def test_package_reads_ours_and_we_read_the_packages(
    tmp_path: Path, tensors: dict[str, StoredArray]
) -> None:
    plain = {name: a.data for name, a in tensors.items() if name not in ("half", "turned")}
    write_tensors(tmp_path / "a", {name: tensors[name] for name in plain})
    for name, values in oracle.load_file(tmp_path / "a").items():
        np.testing.assert_array_equal(values, plain[name])
    oracle.save_file(plain, tmp_path / "b")
    for name, stored in map_tensors(tmp_path / "b").items():
        np.testing.assert_array_equal(stored.data, plain[name])


def test_same_tensors_give_the_same_bytes(tmp_path: Path, tensors: dict[str, StoredArray]) -> None:
    write_tensors(tmp_path / "a", tensors)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_are_views_of_the_file_and_survive_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": StoredArray("float16", np.ones((64, 64), np.float16))})
    array = map_tensors(path)["x"]
    assert not array.data.flags.owndata
    write_tensors(path, {"x": StoredArray("float16", np.zeros((64, 64), np.float16))})
    assert array.data.min() == 1.0
    path.unlink()
    assert array.data.min() == 1.0


def test_ignored_names_may_have_any_type(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a", {"mask": entry([4], 0, 4, "BOOL")}, bytes(4))
    assert map_tensors(path, ignore=lambda name: name == "mask") == {}
    with pytest.raises(CheckpointError, match="mask has the type BOOL"):
        map_tensors(path)


@pytest.mark.parametrize(
    ("header", "data", "cause"),
    [
        (b'{"x": 1, "x": 2}', b"", "twice"),
        (b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4),
         "twice"),
        (b"[" * 100_000, b"", "JSON"),
        (b"\xff\xfe", b"", "JSON"),
        (b"[]", b"", "object"),
        ({"x": entry([1], 0, 4)}, bytes(3), "valid"),
        ({"x": entry([1], 0, 4)}, bytes(5), "valid"),
        ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, bytes(4), "valid"),
        ({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12), "valid"),
        ({"x": entry([2**62], 0, 4)}, bytes(4), "valid"),
        ({"x": entry([2**62, 8], 0, 0)}, b"", "valid"),
        ({"x": entry([2**62, 0], 0, 0)}, b"", "tensor x"),
        ({"x": entry([-1], 0, 4)}, bytes(4), "valid"),
        ({"x": entry([1], 4, 0)}, bytes(4), "valid"),
        ({"x": entry([2], 0, 4)}, bytes(4), "valid"),
        ({"x": {"dtype": "F32"}}, b"", "valid"),
        ({"x": entry([1], 0, 8, "F64")}, bytes(8), "F64"),
        ({"x": 3}, b"", "valid"),
    ],
)  # fmt: skip
def test_malformed_file_is_refused_and_named(
    tmp_path: Path, header: Any, data: bytes, cause: str
) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=cause) as caught:
        map_tensors(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("length", [3, 2**24 + 1, 2**63, 2**64 - 1])
def test_wrong_header_length_is_refused(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / "bad", {"x": entry([1], 0, 4)}, bytes(4), length=length)
    with pytest.raises(CheckpointError, match="bad"):
        map_tensors(path)


def test_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    with open(path, "wb") as file:
        file.write((100 << 20).to_bytes(8, "little"))
        file.truncate(101 << 20)  # sparse
    with pytest.raises(CheckpointError, match="header is larger"):
        map_tensors(path)


def test_missing_file_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, cause in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "regular"),
        (tmp_path / "pipe", "regular"),
    ):
        with pytest.raises(CheckpointError, match=cause):
            map_tensors(path)


def test_mutated_files_load_or_are_refused_but_never_crash(
    tmp_path: Path, tensors: dict[str, StoredArray]
) -> None:
    write_tensors(tmp_path / "a", tensors)
    original = (tmp_path / "a").read_bytes()
    generator = random.Random(1)
    refused = 0
    for _ in range(400):
        data = bytearray(original)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (tmp_path / "b").write_bytes(data)
        try:
            map_tensors(tmp_path / "b")
        except CheckpointError:
            refused += 1
    assert 50 < refused <= 400
