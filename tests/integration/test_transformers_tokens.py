"""The torch runner under the engine writes what `generate` of transformers does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.engine.engine import Engine
from llmserve.runners.torch_runner import TorchRunner
from support.engines import make_config, make_request, run, tokens_by_choice
from support.theirs import make_theirs

# transformers leaves its JSON files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

PROMPTS = [[5, 9, 33, 2, 61, 7, 7, 20, 4], [3], [8, 1, 40, 12, 64]]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    yield module
    module.logging.set_verbosity_warning()
    module.logging.enable_progress_bar()


def our_tokens(folder: Path, *, deterministic: bool) -> list[list[int]]:
    """Three sequences at once, prompts in chunks."""
    runner = TorchRunner(Checkpoint.open(folder), deterministic=deterministic)
    runner.info = dataclasses.replace(runner.info, eos_token_ids=())
    num_blocks = (40,) * len(runner.info.cache_groups)
    engine = Engine(
        runner, make_config(num_blocks=num_blocks, max_seq_len=64, max_batched_tokens=6)
    )
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(make_request(str(index), prompt, max_tokens=NEW_TOKENS))
    tokens = tokens_by_choice(run(engine))
    return [tokens[str(index), 0] for index in range(len(PROMPTS))]


def their_tokens(theirs: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    written = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = written[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize(
    "name",
    [
        "llama-llama3",
        "mistral",
        "gpt2",
        "qwen2",
        "qwen2-windows",
        "qwen3",
        "olmo2",
        "phi3-partial",
        "gemma2",
        "gemma2-tight-caps",
        "gemma3",
        "gemma3-linear",
        "mixtral",
        "qwen2moe",
        "qwen2moe-windows",
        "qwen3moe-dense-layers",
    ],
)
def test_greedy_tokens_are_theirs(transformers: Any, tmp_path: Path, name: str) -> None:
    theirs = make_theirs(transformers, name)
    theirs.save_pretrained(tmp_path)
    expected = [their_tokens(theirs, prompt) for prompt in PROMPTS]
    assert our_tokens(tmp_path, deterministic=False) == expected
    assert our_tokens(tmp_path, deterministic=True) == expected
