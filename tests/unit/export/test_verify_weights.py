"""Bounds on weights: one that is off is caught by name, an honest loss however large is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve import model_folder
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ExportError
from llmserve.export import quantize_folder as module
from llmserve.export.quant_options import QuantizationOptions
from llmserve.export.quantize import QuantizedModel, quantize_model
from llmserve.export.quantize_folder import quantize_folder
from llmserve.export.verify import ACCEPTED_KL, verify_folder
from llmserve.manifest import read_certificate
from llmserve.quant.dtypes import StoredArray
from support.models import make_model_folder
from support.variants import random_tensors

INT8 = QuantizationOptions(scheme="int8", measure=False)
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("run") / "model")


def test_integer_that_is_spoiled_on_its_way_to_the_disk_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model_folder.encode_layer

    def spoiled(layer: str, linear: Any) -> Any:
        tensors = encode(layer, linear)
        if layer == LAYER:  # a copy: what is stored may be the layer's own integers
            stored = tensors[f"{layer}.weight"]
            data = stored.data.copy()
            data[3, 4] ^= 1
            tensors[f"{layer}.weight"] = StoredArray(stored.dtype, data)
        return tensors

    monkeypatch.setattr(model_folder, "encode_layer", spoiled)
    with pytest.raises(ExportError, match=rf"tensor {LAYER}\.weight: the folder does not hold"):
        quantize_folder(model, tmp_path / "small", INT8)
    assert list(tmp_path.iterdir()) == []


def test_weight_that_was_rounded_wrongly_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> QuantizedModel:
        found = quantize_model(*args, **kwargs)
        found.layers[LAYER].values[3, 4] ^= 1  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(module, "quantize_model", wrong)
    with pytest.raises(ExportError, match=rf"tensor {LAYER}\.weight: 1 weights are further"):
        quantize_folder(model, tmp_path / "small", INT8)
    assert list(tmp_path.iterdir()) == []


def test_honest_loss_beyond_the_table_is_accepted_and_damage_beside_it_is_not(
    tmp_path: Path,
) -> None:
    config = ModelConfig(
        vocab_size=320, hidden_size=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64,
        intermediate_size=384, max_seq_len=64,
    )  # fmt: skip
    save_model(tmp_path / "model", config, random_tensors(config, scale=0.3))
    quantize_folder(tmp_path / "model", tmp_path / "small", INT8)
    certificate = read_certificate(tmp_path / "small")
    assert certificate is not None
    assert max(form["mean_kl"] for form in certificate["forms"]) > ACCEPTED_KL["int8"]
    source = Checkpoint.open(tmp_path / "model")
    small = quantize_model(source, "int8", None)
    save_model(tmp_path / "bare", config, small.tensors(source))
    assert verify_folder(tmp_path / "bare", against=tmp_path / "model").findings == []
    small.layers[LAYER].scales[5] *= np.float32(1.5)  # type: ignore[union-attr]
    save_model(tmp_path / "damaged", config, small.tensors(source))
    assert verify_folder(tmp_path / "damaged", against=tmp_path / "model").findings
