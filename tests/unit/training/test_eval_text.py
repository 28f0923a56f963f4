"""Loss on texts against one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from llmserve.errors import ConfigError, DataError
from llmserve.model.transformer import Transformer
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.eval_text import evaluate_texts
from support.models import TEXT
from support.tuned import make_tuned

DOCUMENTS = [TEXT, TEXT[:40], TEXT[20:90], "a"]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_tuned().model.eval()  # a context of 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300)


@torch.no_grad()
def loss_by_token(model: Transformer, ids: list[int], context: int, stride: int) -> float:
    """Each token after the window that its stride belongs to."""
    total = 0.0
    for place in range(1, len(ids)):
        end = min((place - 1) // stride * stride + 1 + stride, len(ids))
        begin = max(0, end - 1 - context)
        logits = model(torch.tensor([ids[begin:place]]))[0, -1].double()
        total -= float(logits.log_softmax(-1)[ids[place]])
    return total


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (9, 9), (9, 1)])
def test_loss_is_that_of_one_token_at_a_time(
    model: Transformer, tokenizer: Tokenizer, context: int, stride: int
) -> None:
    figures = evaluate_texts(model, tokenizer, DOCUMENTS, context=context, stride=stride)
    encoded = [tokenizer.encode(text) for text in DOCUMENTS]
    total = sum(loss_by_token(model, ids, context, stride) for ids in encoded)
    count = sum(len(ids) - 1 for ids in encoded)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert figures.loss.value == pytest.approx(total / count, rel=1e-5)
    assert figures.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert figures.bits_per_byte.value == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert (figures.num_documents, figures.num_tokens, figures.num_bytes) == (4, count, size)
    assert figures.loss.low < figures.loss.value < figures.loss.high


def test_windows_stand_for_documents_where_there_is_one(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    figures = evaluate_texts(model, tokenizer, [TEXT * 3])
    assert figures.num_documents == 1
    assert figures.loss.low < figures.loss.value < figures.loss.high


def test_settings_and_texts_that_cannot_be_used_are_refused(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    for context, stride in ((17, 17), (16, 17), (16, -1)):
        with pytest.raises(ConfigError, match="the stride must be from 1 to the context"):
            evaluate_texts(model, tokenizer, [TEXT], context=context, stride=stride)
    with pytest.raises(DataError, match="no text with at least two tokens"):
        evaluate_texts(model, tokenizer, [""])
