"""Comparing two models over a text, against a plain numpy computation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmserve.errors import DataError, ExportError
from llmserve.export.measure import Comparison, compare_logits, text_windows

VOCAB = 11


class Table:
    """A model whose logits after a token depend on that token and its place alone."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(400, VOCAB, VOCAB, generator=generator)

    def __call__(self, token_ids: Tensor) -> Tensor:
        places = torch.arange(token_ids.shape[1])
        return self.rows[places, token_ids]


def compare_models(
    before: Table, after: Table, windows: list[list[int]], **options: Any
) -> Comparison:
    def logits(model: Table) -> Iterator[Tensor]:
        return (model(torch.tensor([window]))[0] for window in windows)

    return compare_logits(logits(before), logits(after), windows, **options)


WINDOWS = [[3, 1, 4, 1, 5], [9, 2], list(np.random.default_rng(0).integers(0, VOCAB, 300))]


def test_figures_are_those_of_a_plain_computation() -> None:
    before, after = Table(0), Table(1)
    losses, kls, agreements, errors = [], [], [], []
    for window in WINDOWS:
        for place, (token, target) in enumerate(pairwise(window)):
            logits = [model.rows[place, token].double().numpy() for model in (before, after)]
            p, q = (np.exp(row) / np.exp(row).sum() for row in logits)
            losses.append((-np.log(p[target]), -np.log(q[target])))
            kls.append((p * np.log(p / q)).sum())
            agreements.append(logits[0].argmax() == logits[1].argmax())
            errors.append(np.abs(logits[0] - logits[1]).max())
    found = compare_models(before, after, WINDOWS)
    assert found.num_tokens == len(losses) == 4 + 1 + 299
    np.testing.assert_allclose(
        [found.loss_before, found.loss_after], np.mean(losses, axis=0), rtol=1e-9
    )
    assert found.mean_kl == pytest.approx(np.mean(kls), rel=1e-9)
    assert found.top1_agreement == pytest.approx(np.mean(agreements))
    assert found.max_logit_error == pytest.approx(np.max(errors), rel=1e-6)
    assert found.perplexity_after == pytest.approx(np.exp(found.loss_after))


def test_model_against_itself_loses_nothing() -> None:
    found = compare_models(Table(0), Table(0), WINDOWS)
    assert (found.mean_kl, found.top1_agreement, found.max_logit_error) == (0.0, 1.0, 0.0)
    assert found.loss_before == found.loss_after


def test_every_window_is_reported() -> None:
    seen = []
    compare_models(Table(0), Table(0), WINDOWS, on_window=lambda: seen.append(1))
    assert len(seen) == len(WINDOWS)


@pytest.mark.parametrize(("broken", "name"), [(0, "original"), (1, "quantized")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_model_that_predicts_nothing_is_named(broken: int, name: str, value: float) -> None:
    models = [Table(0), Table(0)]
    models[broken].rows = torch.full_like(models[broken].rows, value)
    with pytest.raises(ExportError, match=f"the {name} model's loss on the text is nan"):
        compare_models(*models, WINDOWS)


def test_windows_hold_every_token_once() -> None:
    ids = list(range(100, 123))
    windows = text_windows(ids, length=8, bos_token_id=1)
    assert all(window[0] == 1 and len(window) <= 8 for window in windows)
    assert [token for window in windows for token in window[1:]] == ids


def test_windows_without_bos_are_full() -> None:
    windows = text_windows(list(range(20)), length=8, bos_token_id=None)
    assert [len(window) for window in windows] == [8, 8, 4]


def test_window_of_one_token_is_left_out() -> None:
    assert text_windows(list(range(9)), length=8, bos_token_id=None) == [list(range(8))]


@pytest.mark.parametrize(("ids", "bos"), [([], 1), ([5], None)])
def test_text_too_short_is_refused(ids: list[int], bos: int | None) -> None:
    with pytest.raises(DataError, match="too short"):
        text_windows(ids, length=8, bos_token_id=bos)
