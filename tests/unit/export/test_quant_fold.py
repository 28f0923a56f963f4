"""Folding a scaling of inputs changes no model: logits before and after, for every variant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.export.calibrate import ActivationStream, InputStatistics
from llmserve.export.quant_fold import fold, fold_sites, tie
from llmserve.model.weights import load_canonical, load_model
from support.variants import GEMMA3, GPT2, LLAMA, MIXTRAL, OLMO2, VARIANTS, random_tensors

IDS = torch.arange(3, 33)[None]


@pytest.mark.parametrize("name", VARIANTS)
def test_folded_model_computes_the_same(tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    save_model(tmp_path / "model", config, random_tensors(config))
    source = Checkpoint.open(tmp_path / "model")
    tensors = {name: source.float32(name) for name in source.names()}
    rng = np.random.default_rng(0)
    for index in range(config.num_layers):
        for site in fold_sites(config, index):
            width = tensors[f"{site.consumers[0]}.weight"].shape[1]
            scales = tie(site, rng.uniform(0.3, 3.0, width).astype(np.float32))
            changed, _ = fold(tensors, site, scales, config)
            assert changed
            tensors |= changed
    model = load_model(source)
    with torch.no_grad():
        before = model(IDS)
        load_canonical(model, {name: torch.tensor(value) for name, value in tensors.items()})
        torch.testing.assert_close(model(IDS), before, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("config", "count"), [(LLAMA, 4), (GPT2, 3), (GEMMA3, 4), (OLMO2, 2), (MIXTRAL, 2)]
)
def test_sites_are_where_something_linear_makes_the_input(config: object, count: int) -> None:
    assert len(list(fold_sites(config, 0))) == count  # type: ignore[arg-type]


def test_rounded_norm_is_made_good_in_the_columns() -> None:
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    tensors = random_tensors(config)
    site = next(fold_sites(config, 0))
    scales = np.random.default_rng(0).uniform(0.3, 3.0, 24).astype(np.float32)
    changed, divisors = fold(tensors, site, scales, config)
    norm = f"{site.producer}.weight"
    for layer in site.consumers:
        name = f"{layer}.weight"
        product = changed[name] * changed[norm]
        np.testing.assert_allclose(product, tensors[name] * tensors[norm], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(divisors * changed[norm], tensors[norm], rtol=1e-6)
    assert not np.array_equal(divisors, scales), "bfloat16 rounds"


def test_statistics_are_those_of_all_inputs(tmp_path: Path) -> None:
    """Block by block, against hooks on the whole model."""
    save_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    source = Checkpoint.open(tmp_path / "model")
    windows = [[1, *range(3, 20)], [1, 40, 41, 42]]
    seen: list[torch.Tensor] = []
    model = load_model(source)
    model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    rows = torch.cat([x[0] for x in seen])
    stream = ActivationStream(source, windows)
    stream.observe(0)
    stream.advance(0, {})
    found = stream.observe(1)["model.layers.1.mlp.down_proj"]
    assert found.num_rows == len(rows) == 22
    torch.testing.assert_close(found.gram, rows.T @ rows)
    torch.testing.assert_close(found.largest, rows.abs().amax(0))
    torch.testing.assert_close(found.mean_magnitude, rows.abs().mean(0))
    torch.testing.assert_close(found.sample, rows)


def test_nothing_seen_has_no_importance() -> None:
    statistics = InputStatistics.of_width(4)
    statistics.add(torch.zeros(0, 4))
    assert statistics.importance is None
    assert not statistics.mean_magnitude.any()
