"""LoRA in training: nothing at first, then what the merged weights would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_canonical
from llmserve.training.finetune_model import TunedModel
from llmserve.training.lora_weights import LoraWeights
from support.tuned import PROJECTIONS, make_tuned
from support.variants import VARIANTS

IDS = torch.randint(60, (2, 30), generator=torch.Generator().manual_seed(0))


def test_new_matrices_change_nothing() -> None:
    model = Transformer(VARIANTS["llama"])
    lora = LoraWeights(model.config, PROJECTIONS, rank=3, alpha=6.0, seed=0)
    with torch.no_grad():
        assert torch.equal(TunedModel(model, lora, {}).logits(IDS), model(IDS))


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("llama", PROJECTIONS),
        ("llama", ("v_proj",)),
        ("llama", ("q_proj", "up_proj")),
        ("llama-biases", ("k_proj", "gate_proj")),
        ("gpt2", PROJECTIONS),
        ("phi3", PROJECTIONS),
        ("mixtral", PROJECTIONS),
    ],
)
def test_beside_the_weights_equals_merged_into_them(variant: str, targets: Any) -> None:
    tuned = make_tuned(lora=targets, config=VARIANTS[variant])
    merged = Transformer(VARIANTS[variant])
    load_canonical(merged, tuned.tensors())
    with torch.no_grad():
        beside, inside = tuned.logits(IDS), merged(IDS, CausalAttention(merged.config))
        alone = tuned.model(IDS)
    assert float((beside - alone).abs().max()) > 0.1
    torch.testing.assert_close(inside, beside, rtol=1e-5, atol=1e-5 * float(beside.abs().max()))


def test_the_adapter_has_the_projections_that_were_named() -> None:
    adapter = make_tuned(lora=("q_proj", "down_proj")).adapter()
    assert adapter is not None
    assert {place.projection for place in adapter.pairs} == {"q_proj", "down_proj"}
    assert len(adapter.pairs) == 4
    assert {pair.scale for pair in adapter.pairs.values()} == {2.0}


def test_experts_are_not_adapted() -> None:
    with pytest.raises(ConfigError, match="none of the projections up_proj"):
        LoraWeights(VARIANTS["mixtral"], ["up_proj"], rank=2, alpha=2.0, seed=0)
