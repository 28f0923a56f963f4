"""Choices, operations and the table of a comparison; the runs are in the integration test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmserve.errors import ConfigError
from llmserve.model.transformer import Transformer
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.tokenizer_compare import (
    TokenizerChoice,
    comparison_recipe,
    flops_per_token,
    make_tokenizer,
    parse_choice,
)
from llmserve.training.tokenizer_folder import write_tokenizer
from support.texts import CORPUS, trained


def test_choices_are_kinds_with_a_size_or_folders(tmp_path: Path) -> None:
    assert parse_choice("bpe:512") == TokenizerChoice("bpe:512", "bpe", 512)
    write_tokenizer(tmp_path / "t", trained("char"))
    choice = parse_choice(str(tmp_path / "t"))
    assert choice.kind is None
    assert make_tokenizer(choice, []).files() == trained("char").files()
    assert (choice.folder_name, parse_choice("word:300").folder_name) == ("t", "word-300")


@pytest.mark.parametrize("text", ["bpe", "bpe:", "bpe:x", "letters:300", "no/such/folder", ""])
def test_other_choices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="nor a folder with a tokenizer"):
        parse_choice(text)


def test_tokenizer_is_trained_on_what_it_is_given() -> None:
    made = make_tokenizer(parse_choice("bpe:300"), [CORPUS])
    assert made.files() == Tokenizer.train("bpe", [CORPUS], vocab_size=300).files()


@pytest.mark.parametrize("vocab_size", [300, 4096])
def test_operations_are_those_that_torch_counts(vocab_size: int) -> None:
    recipe = comparison_recipe(steps=1, threads=1)
    model = Transformer(recipe.model_config(vocab_size=vocab_size))
    ids = torch.zeros(2, recipe.max_seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    # Torch counts the scores of all pairs, and what the fused kernel computes again backward.
    assert flops_per_token(recipe, vocab_size) == pytest.approx(counted, rel=0.2)
