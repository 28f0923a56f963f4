"""Folders made to harm: refused at once, with little memory, and nothing outside them is read."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import CheckpointError
from llmserve.quant.dtypes import StoredArray
from llmserve.tensor_file import map_tensors, write_tensors
from support.variants import LLAMA, random_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    (tmp_path / "model/manifest.json").unlink()
    return tmp_path / "model"


def refuse(folder: Path, match: str) -> None:
    """Opening fails with one line, in under a second of work and with less than 20 MB."""
    # Processor time, not the clock's: another process may hold the cores for longer than that.
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            Checkpoint.open(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
    assert time.process_time() - start < 1.0
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


LIES: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 2**20}, "embed_tokens"),
    ({"vocab_size": 2**63}, "vocab_size"),
    ({"vocab_size": 10**400}, "vocab_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": -67}, "vocab_size"),
    ({"vocab_size": 67.0}, "vocab_size"),
    ({"vocab_size": "67"}, "vocab_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"vocab_size": None}, "vocab_size"),
    ({"hidden_size": 48}, "shape|implies"),
    ({"hidden_size": 65_536, "head_dim": 6}, "implies"),
    ({"hidden_size": 10**9}, "hidden_size"),
    ({"hidden_size": [24]}, "hidden_size"),
    ({"num_hidden_layers": 1}, "no place"),
    ({"num_hidden_layers": 3}, "missing"),
    ({"num_hidden_layers": 512}, "missing"),
    ({"num_hidden_layers": 10**6}, "num_layers"),
    ({"num_attention_heads": 2}, "implies"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"num_key_value_heads": 4}, "implies"),
    ({"head_dim": 7}, "head_dim"),
    ({"head_dim": 65_536}, "implies"),
    ({"intermediate_size": 41}, "implies"),
    ({"intermediate_size": 2**40}, "intermediate_size"),
    ({"max_position_embeddings": 2**40}, "max_seq_len"),
    ({"rms_norm_eps": -1.0}, "norm_eps"),
    ({"rms_norm_eps": "tiny"}, "norm_eps"),
    ({"rope_theta": 0, "rope_parameters": None}, "rope_theta"),
    ({"tie_word_embeddings": False}, "lm_head"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"attention_bias": True}, "bias is missing"),
    ({"mlp_bias": True}, "bias is missing"),
    ({"model_type": "gpt2"}, "n_embd|vocab|config"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"model_type": "llama4"}, "llama4"),
    ({"dtype": "int8", "torch_dtype": None}, "dtype"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"quantization_config": []}, "quantization_config"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "SCB|int8"),
]


@pytest.mark.parametrize(("lie", "named"), LIES)
def test_lying_configuration_is_refused(folder: Path, lie: dict[str, Any], named: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **lie}))
    refuse(folder, named)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "llama", "model_type": "gpt2"}',
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"vocab_size": NaN}',
        '{"vocab_size": ' + "9" * 5000 + "}",
        "",
        "null",
        '"\\ud800',
    ],
)
def test_configuration_that_is_no_plain_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, r"config\.json")


def test_huge_configuration_is_refused(folder: Path) -> None:
    with open(folder / "config.json", "wb") as file:
        file.truncate(1 << 30)
    refuse_file = pytest.raises(CheckpointError, match=r"config\.json: larger")
    with refuse_file:
        Checkpoint.open(folder)


def shard(folder: Path, name: str) -> None:
    """Make the folder a sharded one whose only shard the index calls `name`."""
    names = map_tensors(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "a/../../outside.safetensors",
        "./outside.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a\0.safetensors",
        "outside.safetensors\n",
        ".hidden.safetensors",
        "pytorch_model.bin",
        "ä.safetensors",
        7,
        None,
        ["x"],
    ],
)
def test_shard_of_an_unsafe_name_is_refused(folder: Path, name: Any) -> None:
    shard(folder, name)
    refuse(folder, r"index\.json")


def test_shard_that_is_a_link_to_the_outside_is_refused(folder: Path) -> None:
    shard(folder, "model-1.safetensors")
    (folder / "model-1.safetensors").symlink_to("../outside.safetensors")
    refuse(folder, "link to a file outside")
    (folder / "model-1.safetensors").unlink()
    (folder / "inside.safetensors").write_bytes(
        (folder.parent / "outside.safetensors").read_bytes()
    )
    (folder / "model-1.safetensors").symlink_to("inside.safetensors")
    Checkpoint.open(folder)


def test_links_of_the_hugging_face_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    shard(folder, "model-1.safetensors")
    snapshot, blobs = tmp_path / "repo/snapshots/rev", tmp_path / "repo/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "outside.safetensors").rename(blobs / "ab12")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/ab12")
    for name in ("config.json", INDEX):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    Checkpoint.open(snapshot)


def test_weights_may_be_a_link_or_a_hard_link(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    os.link(tmp_path / "elsewhere", folder / "model.safetensors")
    Checkpoint.open(folder)


def test_weights_that_are_a_pipe_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refuse(folder, "not a regular file")


def test_dangling_and_circular_links_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refuse(folder, "model")


def test_giant_shapes_are_refused_before_anything_is_allocated(folder: Path) -> None:
    tensors = map_tensors(folder / "model.safetensors")
    header = {
        name: {"dtype": "F32", "shape": [2**31, 2**20], "data_offsets": [0, 4]} for name in tensors
    }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    refuse(folder, r"model\.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:4],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
    ],
)
def test_torn_weights_are_refused_without_a_manifest_too(
    folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refuse(folder, r"model\.safetensors")


class Canary:
    """Unpickling one creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
def test_pickled_weights_are_refused_by_name_and_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(folder.parent / "canary")))
    refuse(folder, f"{name}: pickled weights are never opened; .*safetensors")
    refuse(folder / name, "pickled")
    assert not (folder.parent / "canary").exists()


def test_hostile_scales_are_refused(folder: Path) -> None:
    """A quantized folder whose group size, shape or scales are not what its layers can have."""
    values = json.loads((folder / "config.json").read_text())
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 5},
    }
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, "group size 5")
    group["weights"] |= {"strategy": "channel", "group_size": None}
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, "weight")
    tensors = dict(map_tensors(folder / "model.safetensors"))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out = tensors[name].shape[0]
        tensors[name] = StoredArray("int8", np.ones(tensors[name].shape, np.int8))
        tensors[f"{name}_scale"] = StoredArray("float32", np.full((out, 1), np.nan, np.float32))
    write_tensors(folder / "model.safetensors", tensors)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*NaN"):
        checkpoint.linear("model.layers.0.mlp.up_proj.weight")
