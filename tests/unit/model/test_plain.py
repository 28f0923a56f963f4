"""The plain loop: the whole forward's own choices, and a real model's known text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.model.plain import generate_plain
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_model
from support.variants import GPT2, LLAMA, MISTRAL


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, GPT2], ids=["llama", "mistral", "gpt2"])
def test_tokens_are_those_of_the_model_without_a_cache(config: ModelConfig) -> None:
    model = Transformer(config).eval()
    model.initialize(torch.Generator().manual_seed(3))
    ids = [4, 9, 1]
    generated = generate_plain(model, ids, 20)
    for token_id in generated:
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token_id
        ids.append(token_id)


def test_ties_go_to_the_lowest_id() -> None:
    model = Transformer(LLAMA).eval()
    with torch.no_grad():
        model.norm.weight.zero_()  # so every logit is 0
    assert generate_plain(model, [50], 4) == [0, 0, 0, 0]


@pytest.mark.parametrize(("prompt", "count"), [([], 3), ([1] * 40, 9)])
def test_empty_or_too_long_is_refused(prompt: list[int], count: int) -> None:
    with pytest.raises(ConfigError, match=f"{len(prompt)} prompt tokens"):
        generate_plain(Transformer(LLAMA), prompt, count)


def test_real_model_writes_its_known_text(stories260k: Path) -> None:
    model = load_model(Checkpoint.open(stories260k))
    expected = json.loads((stories260k / "expected-greedy-200.json").read_text())
    assert generate_plain(model, [1], 200) == expected


@torch.inference_mode()
def test_real_model_has_its_known_loss(stories260k: Path, shared_folder: Path) -> None:
    model = load_model(Checkpoint.open(stories260k))
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    text = (shared_folder / "data/tinystories-sample/tinystories_sample.txt").read_text()
    total, count = 0.0, 0
    for story in text.split("<|endoftext|>"):
        if not story.strip():
            continue
        ids = torch.tensor([[1, *tokenizer.encode(story.strip(), add_special_tokens=False).ids]])
        total += float(F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert total / count == pytest.approx(1.2664, abs=1e-3)
