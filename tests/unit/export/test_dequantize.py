"""A quantized folder as a plain one: the same model at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.cli import main
from llmserve.errors import ConfigError, ExportError
from llmserve.export.dequantize import dequantize_folder
from llmserve.export.quantize import quantize_model
from llmserve.model.weights import load_model
from support.foreign_folders import FOREIGN, write_foreign_folder
from support.models import make_model_folder
from support.variants import LLAMA, random_tensors

IDS = torch.arange(3, 33)[None]


@pytest.mark.parametrize("form", FOREIGN)
def test_plain_folder_gives_the_logits_of_the_quantized_one(tmp_path: Path, form: Any) -> None:
    write_foreign_folder(tmp_path / "model", form)
    result = dequantize_folder(tmp_path / "model", tmp_path / "plain")
    quantized, plain = (Checkpoint.open(tmp_path / name) for name in ("model", "plain"))
    assert quantized.quantization is not None
    assert plain.quantization is None
    assert result.form == quantized.quantization.scheme
    with torch.no_grad():
        wanted, found = (load_model(one)(IDS) for one in (quantized, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_command_writes_beside_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Checkpoint.open(make_model_folder(tmp_path / "model"))
    tensors = quantize_model(source, "int4", 16).tensors(source)
    save_model(tmp_path / "small", source.config, tensors, copy_from=source.path)
    assert main(["export", "dequantize", str(tmp_path / "small"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "the model's int4 weights are bfloat16" in printed
    plain = Checkpoint.open(tmp_path / "small-plain")
    assert plain.config.dtype == "bfloat16"
    assert (plain.path / "tokenizer.json").is_file()
    assert "dequantization" in (plain.path / "lineage.json").read_text()


def test_plain_model_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    with pytest.raises(ConfigError, match="is not quantized"):
        dequantize_folder(tmp_path / "model", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_weight_beyond_the_type_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.float32(1e6)
    save_model(tmp_path / "model", LLAMA, tensors)
    source = Checkpoint.open(tmp_path / "model")
    save_model(tmp_path / "small", LLAMA, quantize_model(source, "int8").tensors(source))
    with pytest.raises(ExportError, match=r"up_proj\.weight holds a weight beyond the range"):
        dequantize_folder(tmp_path / "small", tmp_path / "plain", dtype="float16")
