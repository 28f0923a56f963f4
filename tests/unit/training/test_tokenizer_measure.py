"""Figures of tokenizers, against the definitions written out plainly."""

from __future__ import annotations

import re

import pytest

from llmserve.text.tokenizer import Tokenizer
from llmserve.text.train import TokenizerKind
from llmserve.training.tokenizer_measure import (
    ADVERSARIAL_CHARS,
    adversarial_texts,
    measure_tokenizer,
)
from support.texts import CORPUS, KINDS, trained

TEXT = ["The list of unseen names, ßtreets and 20 €.", "values is żółć sorted; 漢字 list"]


def plain_figures(tokenizer: Tokenizer, documents: list[str]) -> tuple[float, float, float]:
    """Bytes per token, share of whole words and coverage, token by token."""
    num_tokens, spelled, whole, words = 0, 0, 0, 0
    for document in documents:
        spans, place = [], 0
        for token_id in tokenizer.encode(document, add_special_tokens=False):
            data = tokenizer.token_bytes(token_id)
            [name] = tokenizer.text_tokens([token_id])
            if re.fullmatch("<0x..>", name) or (len(data) == 1 and data[0] > 127):
                spelled += 1
            spans.append((place, place + len(data)))
            place += len(data)
        num_tokens += len(spans)
        for match in re.finditer("[A-Za-zßżółć漢字]+", document):
            first, last = (len(document[:place].encode()) for place in match.span())
            words += 1
            whole += any(end == last and first - 1 <= begin <= first for begin, end in spans)
    num_bytes = sum(len(document.encode()) for document in documents)
    return num_bytes / num_tokens, whole / words, 1 - spelled / num_bytes


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmserve.training.tokenizer_measure.ADVERSARIAL_CHARS", 500)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_definitions(kind: TokenizerKind) -> None:
    figures = measure_tokenizer(trained(kind), TEXT)
    found = figures.bytes_per_token, figures.whole_words, figures.coverage
    assert found == pytest.approx(plain_figures(trained(kind), TEXT))
    assert figures.vocab_size == trained(kind).vocab_size
    assert figures.is_lossless
    assert figures.encode_mb_per_s > 0
    assert figures.adversarial_s > 0


def test_known_text_is_covered_and_whole() -> None:
    figures = measure_tokenizer(trained("word"), [CORPUS])
    assert (figures.coverage, figures.whole_words) == (1.0, 1.0)
    assert measure_tokenizer(trained("char"), [CORPUS]).whole_words < 0.1


def test_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **options: plain(self, ids, **options).lower()
    )
    assert not measure_tokenizer(trained("bpe"), TEXT).is_lossless


def test_adversarial_texts_are_long_and_differ() -> None:
    texts = adversarial_texts(ADVERSARIAL_CHARS)
    assert {len(text) for text in texts} == {200_000}
    assert len(set(texts)) == len(texts) > 10
