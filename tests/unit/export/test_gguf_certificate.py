"""The certificate of a GGUF file: what it says, and that a changed weight or value is named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.cli import main
from llmserve.config import RopeScaling
from llmserve.errors import CheckpointError, ConfigError, ExportError
from llmserve.export import gguf
from llmserve.export.gguf import export_gguf
from llmserve.export.gguf_blocks import BlockType, encode
from llmserve.export.gguf_certificate import certificate_path, verify_gguf
from llmserve.export.gguf_reader import GgufFile
from support.gguf_reader import read_gguf
from support.models import make_model_folder

KINDS: tuple[BlockType, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def exported(model: Path) -> Path:
    """A folder with one file of every type, made once. Not to be changed."""
    folder = model.with_name("files")
    if not folder.exists():
        folder.mkdir()
        for kind in KINDS:
            export_gguf(model, folder / f"{kind}.gguf", kind=kind)
    return folder


@pytest.fixture
def files(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(exported, tmp_path / "files")


@pytest.mark.parametrize("kind", KINDS)
def test_reader_gives_what_another_reader_gives(exported: Path, kind: BlockType) -> None:
    path = exported / f"{kind}.gguf"
    wanted, found = read_gguf(path), GgufFile(path)
    assert found.metadata == wanted.metadata
    assert found.names() == list(wanted.tensors)
    for name in found.names():
        np.testing.assert_array_equal(found.float32(name), wanted.tensors[name])


def test_certificates_say_what_each_type_costs(exported: Path) -> None:
    costs = []
    for kind in KINDS:
        certificate = json.loads(certificate_path(exported / f"{kind}.gguf").read_text())
        (form,) = certificate["forms"]
        assert form["mean_kl"] <= certificate["accepted_kl"] <= 1.1 * form["mean_kl"] + 1e-6
        assert len(certificate["layers"]) == 3
        costs.append(form["mean_kl"])
    assert costs[0] < 1e-9
    assert costs[0] < costs[1] < costs[2] < costs[3] < costs[4]


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
def test_untouched_file_is_verified_alone_and_says_the_same(files: Path, kind: str) -> None:
    path = files / f"{kind}.gguf"
    before = certificate_path(path).read_bytes()
    assert verify_gguf(path).findings == []
    assert certificate_path(path).read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "byte"),
    [("q8_0", 0), ("q8_0", 9), ("q4_0", 1), ("q4_0", 7), ("f16", 0), ("bf16", 1), ("f32", 3)],
)
def test_one_flipped_bit_of_a_weight_or_scale_is_named(
    files: Path, capsys: pytest.CaptureFixture[str], kind: str, byte: int
) -> None:
    path = files / f"{kind}.gguf"
    flip(path, "blk.1.ffn_up.weight", byte)
    assert main(["verify", str(path)]) == 1
    assert "tensor blk.1.ffn_up.weight: changed" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "old", "new"), [
    ("llama.rope.freq_base", struct.pack("<f", 10_000.0), struct.pack("<f", 20_000.0)),
    ("llama.attention.head_count_kv", struct.pack("<I", 2), struct.pack("<I", 4)),
])  # fmt: skip
def test_changed_value_of_the_header_is_named(
    files: Path, key: str, old: bytes, new: bytes
) -> None:
    path = files / "q8_0.gguf"
    replace_value(path, key, old, new)
    (finding,) = verify_gguf(path).findings
    assert finding.startswith(f"header: {key} was ")


def test_changed_padding_is_found(files: Path) -> None:
    path = files / "q8_0.gguf"
    file, data = GgufFile(path), bytearray(path.read_bytes())
    assert file._at < file._start, "no padding before the data"
    data[file._at] = 1
    path.write_bytes(data)
    (finding,) = verify_gguf(path).findings
    assert finding.startswith("bytes of the file changed")


def test_original_shows_what_a_file_without_a_record_has_wrong(model: Path, files: Path) -> None:
    path = files / "q8_0.gguf"
    certificate_path(path).unlink()
    with pytest.raises(ConfigError, match="--against"):
        verify_gguf(path)
    assert verify_gguf(path, against=model).findings == []
    assert verify_gguf(path).findings == [], "the record was made anew"
    certificate_path(path).unlink()
    flip(path, "blk.0.attn_q.weight", 1, bit=4)  # of a scale
    (finding,) = verify_gguf(path, against=model).findings
    assert "tensor blk.0.attn_q.weight: 3" in finding
    replace_value(path, "llama.rope.freq_base", struct.pack("<f", 1e4), struct.pack("<f", 2e4))
    (finding,) = verify_gguf(path, against=model).findings
    assert finding == "rope_theta is 20000.0, the original's 10000.0"


def test_writer_that_spoils_a_weight_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(values: np.ndarray, kind: BlockType, *, name: str) -> bytes:
        data = bytearray(encode(values, kind, name=name))
        if "layers.1.mlp.gate" in name:
            data[40] ^= 128
        return bytes(data)

    monkeypatch.setattr(gguf, "encode", spoiled)
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_gate\.weight: 1 weights are not"):
        export_gguf(model, tmp_path / "model.gguf", kind="q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scaling", [
    RopeScaling(kind="linear", factor=3.0),
    RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_seq_len=32,
    ),
])  # fmt: skip
def test_stretched_positions_are_verified_too(
    model: Path, tmp_path: Path, scaling: RopeScaling
) -> None:
    source = Checkpoint.open(model)
    config = dataclasses.replace(source.config, rope_scaling=scaling)
    tensors = {name: source.stored(name) for name in source.names()}
    save_model(tmp_path / "model", config, tensors, copy_from=model)
    path = tmp_path / "model.gguf"
    export_gguf(tmp_path / "model", path)
    assert verify_gguf(path).findings == []
    assert verify_gguf(path, against=tmp_path / "model").findings == []
    if scaling.kind == "llama3":
        flip(path, "rope_freqs.weight", 2)
        assert verify_gguf(path).findings == ["tensor rope_freqs.weight: changed"]
        certificate_path(path).unlink()
        (finding,) = verify_gguf(path, against=tmp_path / "model").findings
        assert "rope_freqs.weight" in finding


@pytest.mark.parametrize("length", [0, 3, 20, 900, -1])
def test_torn_file_is_refused_by_name(files: Path, length: int) -> None:
    path = files / "q8_0.gguf"
    path.write_bytes(path.read_bytes()[: length if length >= 0 else -200])
    with pytest.raises(CheckpointError, match=r"q8_0\.gguf"):
        verify_gguf(path)


def test_any_flipped_bit_of_a_header_is_an_error_or_a_finding(files: Path) -> None:
    path = files / "f32.gguf"
    whole = path.read_bytes()
    random = np.random.default_rng(4)
    for at in random.integers(0, 12_000, 60):
        data = bytearray(whole)
        data[at] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            assert verify_gguf(path).findings, at


def flip(path: Path, tensor: str, byte: int, *, bit: int = 0) -> None:
    """One bit of a tensor's bytes."""
    file = GgufFile(path)
    data = bytearray(path.read_bytes())
    data[file._start + file._entries[tensor].offset + byte] ^= 1 << bit
    path.write_bytes(data)


def replace_value(path: Path, key: str, old: bytes, new: bytes) -> None:
    """A scalar of the header."""
    data = path.read_bytes()
    at = data.index(key.encode()) + len(key) + 4
    assert data[at : at + len(old)] == old
    path.write_bytes(data[:at] + new + data[at + len(old) :])
