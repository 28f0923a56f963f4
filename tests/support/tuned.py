"""Models being tuned, without a folder, and examples made of random ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmserve.config import Head, ModelConfig
from llmserve.model.transformer import Transformer
from llmserve.training.batches import IGNORED
from llmserve.training.finetune_examples import Example, TokenRow
from llmserve.training.finetune_model import TunedModel
from llmserve.training.lora_weights import LoraWeights
from support.training_runs import tiny_config

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tuned(
    head: Head | None = None, *, lora: Sequence[str] = (), config: ModelConfig | None = None
) -> TunedModel:
    """A model with random weights, and LoRA on the projections named."""
    config = config or tiny_config(head=head)
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that tokens differ
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    weights = LoraWeights(config, lora, rank=3, alpha=6.0, seed=1) if lora else None
    if weights is not None:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in weights.parameters().items():
            if name.endswith("lora_B.weight"):
                parameter.data.normal_(0.0, 0.3, generator=generator)
    return TunedModel(model, weights, {})


def random_row(length: int, *, num_targets: int = 0, seed: int = 0) -> TokenRow:
    """Random ids, of which the last `num_targets` are to be predicted."""
    ids = torch.randint(300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    if not num_targets:
        return TokenRow(tuple(ids))
    is_target = [index >= length - num_targets for index in range(length)]
    return TokenRow.predicting(ids, is_target)


def random_examples(count: int, *, rows: int = 1) -> list[Example]:
    """Examples of 2 to 12 ids, with 1 to 4 to be predicted in each text."""
    return [
        Example(
            tuple(
                random_row(4 + (7 * i + row) % 9, num_targets=1 + i % 4, seed=100 * row + i)
                for row in range(rows)
            )
        )
        for i in range(count)
    ]


@torch.no_grad()
def log_likelihood_alone(tuned: TunedModel, row: TokenRow) -> float:
    """Of the row's targets, from the model on this row by itself."""
    log_probabilities = tuned.logits(torch.tensor([row.ids]))[0].double().log_softmax(-1)
    return sum(
        float(log_probabilities[place, target])
        for place, target in enumerate(row.targets)
        if target != IGNORED
    )
