"""Folders of GPTQ, AWQ and compressed-tensors: each opens, and means what its codes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.errors import CheckpointError
from llmserve.model.weights import load_model
from llmserve.quant.groups import QuantizedLinear
from llmserve.quant.layer_groups import LayerGroup
from llmserve.quant.packing_published import published_specs
from support.foreign_folders import FOREIGN, write_foreign_folder

LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("form", FOREIGN)
def test_every_weight_is_what_its_codes_say(tmp_path: Path, form: Any) -> None:
    _, weights = write_foreign_folder(tmp_path / "model", form)
    checkpoint = Checkpoint.open(tmp_path / "model")
    for name, weight in weights.items():
        np.testing.assert_allclose(checkpoint.float32(name), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FOREIGN)
def test_torch_computes_the_dequantized_weights(tmp_path: Path, form: Any) -> None:
    _, weights = write_foreign_folder(tmp_path / "model", form)
    model = load_model(Checkpoint.open(tmp_path / "model"))
    found = model.layers[1].mlp.down_proj.weight.detach()
    torch.testing.assert_close(found, torch.from_numpy(weights[LAYER]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("form", "has_order"), [("gptq", False), ("gptq-order", True)])
def test_only_a_mixed_order_is_an_order(tmp_path: Path, form: Any, has_order: bool) -> None:
    write_foreign_folder(tmp_path / "model", form)
    linear = Checkpoint.open(tmp_path / "model").linear(LAYER)
    assert isinstance(linear, QuantizedLinear)
    assert (linear.group_of_input is not None) is has_order


def test_width_that_fills_no_whole_word_is_refused() -> None:
    group = LayerGroup(bits=4, group_size=4, targets=(), packing="gptq", is_symmetric=False)
    with pytest.raises(CheckpointError, match=r"gptq packs 8 weights into a word; \[16, 12\]"):
        published_specs((16, 12), group)
