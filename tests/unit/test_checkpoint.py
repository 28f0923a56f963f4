"""Model folders: every variant survives, all layouts of others open, what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import CheckpointError, ConfigError
from llmserve.layouts import expected_tensors, linear_layers
from llmserve.quant.bnb import BitsAndBytesFormat, quantize_bitsandbytes
from llmserve.quant.dtypes import StoredArray, from_float32, to_float32
from llmserve.quant.groups import QuantizedLinear, quantize_rtn
from llmserve.tensor_file import map_tensors, write_tensors
from support.variants import GPT2, LLAMA, PHI3, VARIANTS, random_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama model without manifest, so that tests can change its files."""
    save_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    (tmp_path / "model/manifest.json").unlink()
    return tmp_path / "model"


def stored(folder: Path) -> dict[str, StoredArray]:
    return map_tensors(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, StoredArray]) -> None:
    write_tensors(folder / "model.safetensors", tensors)


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_survives_its_folder(tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    tensors = random_tensors(config)
    save_model(tmp_path / "model", config, tensors)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.config == config
    assert checkpoint.quantization is None
    assert checkpoint.names() == list(tensors)
    for tensor, values in tensors.items():
        assert checkpoint.dtype_of(tensor) == "float32"
        np.testing.assert_array_equal(checkpoint.array(tensor), values)
        np.testing.assert_array_equal(checkpoint.float32(tensor), values)
    assert checkpoint.stored_bytes() == sum(values.nbytes for values in tensors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_short_types_are_rounded_once_and_mapped(tmp_path: Path, config: Any, dtype: Any) -> None:
    config = dataclasses.replace(config, dtype=dtype)
    tensors = random_tensors(config)
    save_model(tmp_path / "model", config, tensors)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.config.dtype == dtype
    for name, values in tensors.items():
        rounded = from_float32(values, dtype)
        assert checkpoint.dtype_of(name) == dtype
        np.testing.assert_array_equal(checkpoint.array(name), rounded.data)
        np.testing.assert_array_equal(checkpoint.float32(name), to_float32(rounded))
        assert not checkpoint.array(name).flags.owndata  # a view of the file
        assert not checkpoint.array(name).flags.writeable


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "name", ["llama", "llama-untied", "gemma2", "phi3", "mixtral", "qwen2_moe", "gpt2", "own-none"]
)
def test_quantized_layers_survive_bit_for_bit(tmp_path: Path, name: str, bits: Any) -> None:
    config = VARIANTS[name]
    tensors: dict[str, Any] = dict(random_tensors(config))
    for layer in linear_layers(config):
        if layer != "lm_head":
            weight = tensors[f"{layer}.weight"]
            size = None if "down_proj" in layer else weight.shape[1] // 2
            tensors[f"{layer}.weight"] = quantize_rtn(weight, bits, size)
    save_model(tmp_path / "model", config, tensors)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.scheme == f"int{bits}"
    for tensor, value in tensors.items():
        if not isinstance(value, QuantizedLinear):
            np.testing.assert_array_equal(checkpoint.linear(tensor), value)
            continue
        read = checkpoint.linear(tensor)
        assert isinstance(read, QuantizedLinear)
        assert read.group_size == value.group_size
        np.testing.assert_array_equal(read.values, value.values)
        np.testing.assert_array_equal(read.scales, value.scales)
        np.testing.assert_array_equal(checkpoint.float32(tensor), value.dequantize())
        with pytest.raises(CheckpointError, match="quantized"):
            checkpoint.array(tensor)


@pytest.mark.bnb
@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_bitsandbytes_layers_survive_bit_for_bit(
    tmp_path: Path, kind: Any, double_quant: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    form = BitsAndBytesFormat(kind=kind, double_quant=double_quant)
    tensors: dict[str, Any] = dict(random_tensors(LLAMA))
    for layer in linear_layers(LLAMA):
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = quantize_bitsandbytes(weight, form, dtype="float32")
    save_model(tmp_path / "model", LLAMA, tensors)
    checkpoint = Checkpoint.open(tmp_path / "model")
    for layer in linear_layers(LLAMA):
        name = f"{layer}.weight"
        np.testing.assert_array_equal(checkpoint.float32(name), tensors[name].dequantize())


def test_tokenizer_files_are_copied_and_extra_files_win(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (source / name).write_text(name)
    save_model(
        tmp_path / "model",
        LLAMA,
        random_tensors(LLAMA),
        copy_from=source,
        extra_files={"tokenizer_config.json": b"ours", "lineage.json": b"{}"},
    )
    assert (tmp_path / "model/tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "model/tokenizer_config.json").read_text() == "ours"
    assert not (tmp_path / "model/notes.txt").exists()
    listed = json.loads((tmp_path / "model/manifest.json").read_text())["files"]
    assert set(listed) == set(os.listdir(tmp_path / "model")) - {"manifest.json"}


@pytest.mark.parametrize("name", ["config.json", "../evil", "a/b", ".hidden", "manifest.json"])
def test_extra_file_of_a_reserved_or_unsafe_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be given"):
        save_model(tmp_path / "m", LLAMA, random_tensors(LLAMA), extra_files={name: b""})
    assert os.listdir(tmp_path) == []


def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    norm = tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        save_model(tmp_path / "m", LLAMA, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        save_model(
            tmp_path / "m", LLAMA, {**tensors, "model.norm.weight": norm, "lm_head.weight": norm}
        )
    with pytest.raises(CheckpointError, match="shape"):
        save_model(tmp_path / "m", LLAMA, {**tensors, "model.norm.weight": norm[:-1]})
    assert os.listdir(tmp_path) == []


def test_sharded_folder_opens(folder: Path) -> None:
    tensors = stored(folder)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for index in range(3):
        file = f"model-{index + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[index::3]}
        write_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = Checkpoint.open(folder)
    for name, values in random_tensors(LLAMA).items():
        np.testing.assert_array_equal(checkpoint.array(name), values)
    index_file.write_text(json.dumps({"weight_map": weight_map | {names[0]: file}}))
    with pytest.raises(CheckpointError, match=r"00001-of-00003.*elsewhere"):
        Checkpoint.open(folder)
    index_file.write_text(json.dumps({"weight_map": weight_map | {"ghost": file}}))
    with pytest.raises(CheckpointError, match=r"00003-of-00003.*ghost is missing"):
        Checkpoint.open(folder)


def test_gpt2_without_prefix_and_with_its_masks_opens(tmp_path: Path) -> None:
    tensors = random_tensors(GPT2)
    save_model(tmp_path / "m", GPT2, tensors)
    (tmp_path / "m/manifest.json").unlink()
    bare = {
        name.removeprefix("transformer."): array for name, array in stored(tmp_path / "m").items()
    }
    bare["h.0.attn.bias"] = StoredArray("uint8", np.ones((1, 1, 4, 4), np.uint8))
    rewrite(tmp_path / "m", bare)
    checkpoint = Checkpoint.open(tmp_path / "m")
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.array(name), values)


def test_stored_copy_of_a_tied_head_is_accepted_if_it_is_one(folder: Path) -> None:
    tensors = stored(folder)
    head = tensors["model.embed_tokens.weight"]
    rewrite(folder, {**tensors, "lm_head.weight": head})
    assert "lm_head.weight" not in Checkpoint.open(folder).names()
    rewrite(folder, {**tensors, "lm_head.weight": StoredArray("float32", head.data + 1)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has no place"):
        Checkpoint.open(folder)


def test_type_is_the_weights_own_where_the_configuration_names_none(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["dtype"], values["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(values))
    rewrite(folder, {name: from_float32(a.data, "bfloat16") for name, a in stored(folder).items()})
    assert Checkpoint.open(folder).config.dtype == "bfloat16"


def test_missing_unknown_and_misshapen_tensors_are_named(folder: Path) -> None:
    tensors = stored(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    up = tensors.pop(name)
    for changed, cause in (
        ({}, "is missing"),
        ({name: up, "model.layers.9.mlp.up_proj.weight": up}, "no place"),
        ({name: StoredArray("float32", up.data.T)}, r"\[24, 40\].*\[40, 24\]"),
        ({name: StoredArray("int8", up.data.astype(np.int8))}, "int8"),
    ):
        rewrite(folder, {**tensors, **changed})
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*up_proj.*{cause}"):
            Checkpoint.open(folder)


def test_unknown_name_is_an_error(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor model"):
        Checkpoint.open(folder).array("model")


def test_missing_path_file_and_folder_without_configuration_are_named(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "weights.pt").write_text("")
    (tmp_path / "empty").mkdir()
    for name, cause in (
        ("absent", "no such model folder"),
        ("file.txt", "is a file"),
        ("weights.pt", "pickled"),
        ("empty", r"no config\.json"),
        ("a\0b", "cannot be read|no such"),
    ):
        with pytest.raises(CheckpointError, match=cause) as caught:
            Checkpoint.open(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(folder)


def test_folder_without_manifest_opens_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoint.open(folder)
    assert [(r.name, r.levelno) for r in caplog.records] == [("llmserve", logging.WARNING)]
    Checkpoint.open(folder, verify=False)
    assert len(caplog.records) == 1


def test_generation_config_is_optional_and_comes_first(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert Checkpoint.open(folder).config.eos_token_ids == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    assert Checkpoint.open(folder).config.eos_token_ids == (9, 5, 2)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Checkpoint.open(folder)


def test_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    prints = set()
    for index, scale in enumerate((1.0, 1.0, 2.0)):
        scaled = {name: values * np.float32(scale) for name, values in tensors.items()}
        save_model(tmp_path / str(index), LLAMA, scaled)
        prints.add(Checkpoint.open(tmp_path / str(index)).fingerprint)
        (tmp_path / str(index) / "manifest.json").unlink()
        prints.add(Checkpoint.open(tmp_path / str(index)).fingerprint)
    assert len(prints) == 4  # with and without manifest, of two models
    assert all(len(value) == 64 for value in prints)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral"])
def test_quantized_layout_of_joined_or_renamed_layers_is_refused(tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    save_model(tmp_path / "m", config, random_tensors(config))
    (tmp_path / "m/manifest.json").unlink()
    edit_config(
        tmp_path / "m", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    )
    with pytest.raises(CheckpointError, match=f"quantized weights of model_type '{name}'"):
        Checkpoint.open(tmp_path / "m")


def test_unknown_quantization_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(CheckpointError, match=r"config\.json: .*aqlm"):
        Checkpoint.open(folder)


def test_all_canonical_tensors_of_a_real_folder_open(stories260k: Path) -> None:
    checkpoint = Checkpoint.open(stories260k)
    assert checkpoint.config.eos_token_ids == (1, 2)
    assert {n: checkpoint.array(n).shape for n in checkpoint.names()} == expected_tensors(
        checkpoint.config
    )


def test_joined_tensor_of_another_size_is_refused_by_its_own_name(tmp_path: Path) -> None:
    save_model(tmp_path / "m", PHI3, random_tensors(PHI3))
    (tmp_path / "m/manifest.json").unlink()
    edit_config(tmp_path / "m", num_key_value_heads=4)
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight is float32 \[48, 24\]"):
        Checkpoint.open(tmp_path / "m")
