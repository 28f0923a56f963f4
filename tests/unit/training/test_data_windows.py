"""A recipe's way of reading a text, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from llmserve.model.transformer import Transformer
from llmserve.training.attention import PackedAttention
from llmserve.training.data_windows import describe_windows, evaluate_text, open_windows
from llmserve.training.evaluation import held_out_loss
from llmserve.training.token_file import TokenFile, write_token_file
from llmserve.training.trainer import Trainer
from support.training_runs import tiny_config, tiny_recipe

SIZES = (5, 30, 16, 1, 12, 7, 44, 9)


@pytest.fixture
def text(tmp_path: Path) -> TokenFile:
    random = np.random.default_rng(0)
    write_token_file(
        tmp_path / "t.json",
        [random.integers(0, 300, size) for size in SIZES],
        vocab_size=300,
        tokenizer_sha256="t",
        text_sha256="d",
        text_bytes=5,
    )
    return TokenFile.open(tmp_path / "t.json")


def make_model() -> Transformer:
    model = Transformer(tiny_config())
    model.initialize(torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def document_losses(model: Transformer, text: TokenFile, num_documents: int) -> tuple[float, int]:
    """Every document on its own, in pieces of the context, its end predicted too."""
    total, count = 0.0, 0
    for start, size in list(zip(text.document_starts, SIZES, strict=True))[:num_documents]:
        ids = torch.tensor(text.ids[start : start + size].astype(np.int64))
        targets = torch.cat([ids[1:], torch.tensor([0])])
        for piece, after in zip(ids.split(16), targets.split(16), strict=True):
            logits = model(piece[None])[0]
            total += float(functional.cross_entropy(logits, after, reduction="sum"))
            count += len(piece)
    return total / count, count


@pytest.mark.parametrize(("max_tokens", "num_documents"), [(None, 8), (60, 4), (52, 4), (1, 1)])
def test_packed_evaluation_is_that_of_each_document(
    text: TokenFile, max_tokens: int | None, num_documents: int
) -> None:
    model, recipe = make_model(), tiny_recipe(packing="documents")
    loss, count = evaluate_text(model, text, recipe, end_id=0, max_tokens=max_tokens)
    expected, num_tokens = document_losses(model, text, num_documents)
    assert count == num_tokens
    assert loss == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_streamed_evaluation_runs_through_the_text(text: TokenFile) -> None:
    model = make_model()
    loss, count = evaluate_text(model, text, tiny_recipe(), end_id=0, max_tokens=50)
    assert count == 50
    assert loss == pytest.approx(held_out_loss(model, text.ids[:51], context=16))


def test_trainer_evaluates_packed_windows_alike(text: TokenFile) -> None:
    recipe = tiny_recipe(packing="documents")
    windows = open_windows(text, recipe, end_id=0)
    trainer = Trainer(make_model(), recipe, windows, precision="float32", threads=2)
    own, _ = evaluate_text(trainer.model, text, recipe, end_id=0, loss_sum=trainer.loss_sum)
    plain, _ = evaluate_text(trainer.model, text, recipe, end_id=0)
    assert own == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_of_a_packed_step_is_the_mean_of_its_targets(text: TokenFile, precision: Any) -> None:
    recipe = tiny_recipe(packing="documents", batch_size=4)
    windows = open_windows(text, recipe, end_id=0)
    model = make_model()
    inputs, targets, positions = windows.read(0, 4)
    assert int((targets >= 0).sum()) == windows.num_targets(0, 4) < targets.numel()
    results = [
        Trainer(make_model(), recipe, windows, precision=precision, threads=threads).run_step()
        for threads in (1, 2)
    ]
    with torch.no_grad():
        logits = model(inputs, PackedAttention(model.config, positions), positions)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for result in results:
        assert result.loss == pytest.approx(float(expected), rel=1e-2)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)


def test_waste_is_said(text: TokenFile) -> None:
    packed = describe_windows(open_windows(text, tiny_recipe(packing="documents"), end_id=0))
    assert "9 windows" in packed
    assert f"{1 - sum(SIZES) / (9 * 16):.2%} of the places unused" in packed
    assert "cut wherever" in describe_windows(open_windows(text, tiny_recipe(), end_id=0))
