"""Held-out figures against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from llmserve.model.transformer import Transformer
from llmserve.training.evaluation import HeldOutFigures, held_out_loss, unigram_loss
from support.training_runs import tiny_config


@pytest.fixture
def model() -> Transformer:
    model = Transformer(tiny_config(), dropout=0.5)
    model.initialize(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 33, 40, 300])
def test_every_token_but_the_first_is_predicted_once(model: Transformer, num_tokens: int) -> None:
    ids = np.random.default_rng(0).integers(0, 300, num_tokens).astype(np.uint16)
    total = 0.0
    tokens = torch.from_numpy(ids.astype(np.int64))
    model.eval()
    for start in range(0, num_tokens - 1, 16):
        window = tokens[start : start + 17]
        logits = model(window[None, :-1])[0]
        total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    model.train()
    loss = held_out_loss(model, ids, context=16)
    assert loss == pytest.approx(total / (num_tokens - 1), rel=1e-5)
    assert model.training


def test_unigram_loss_is_that_of_the_frequencies() -> None:
    train = np.array([0] * 6 + [1], dtype=np.uint16)
    held_out = np.array([2, 0, 0, 1], dtype=np.uint16)
    # Three tokens, each counted once more: 7/10, 2/10, 1/10. The first of the text is not guessed.
    expected = -(2 * math.log(0.7) + math.log(0.2)) / 3
    assert unigram_loss(train, held_out, 3) == pytest.approx(expected)


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    long_tokens = HeldOutFigures(loss=4.0, unigram_loss=6.0, num_tokens=100, num_bytes=400)
    short_tokens = HeldOutFigures(loss=2.0, unigram_loss=3.0, num_tokens=200, num_bytes=400)
    assert long_tokens.bits_per_byte == pytest.approx(short_tokens.bits_per_byte)
    assert long_tokens.bits_per_byte == pytest.approx(1 / math.log(2))
    assert long_tokens.perplexity == pytest.approx(math.exp(4))
    assert long_tokens.unigram_perplexity == pytest.approx(math.exp(6))
