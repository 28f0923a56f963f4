"""GGUF files in llama.cpp itself: same ids of texts, same greedy tokens as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.export.gguf import export_gguf
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams
from llmserve.text.tokenizer import Tokenizer
from support.llama_cpp import Post, llama_server
from support.models import make_model_folder
from support.texts import HARD_TEXTS


def greedy(post: Post, ids: list[int], num_tokens: int) -> dict[str, Any]:
    """llama.cpp's greedy continuation, past ends."""
    sampling = {"temperature": 0, "top_k": 1, "ignore_eos": True, "n_predict": num_tokens}
    return post("/completion", {"prompt": ids, "return_tokens": True, **sampling})


def test_texts_and_tokens_are_the_same(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.load(folder)
    with llama_server(export_gguf(folder, kind="f32").path) as post, LLM(folder) as llm:
        for text in HARD_TEXTS:
            body = {"content": text, "add_special": True, "parse_special": True}
            assert post("/tokenize", body)["tokens"] == tokenizer.encode(text)
        ids = tokenizer.encode("Once upon a time")
        params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        ours = llm.generate([ids], params)[0].choices[0].token_ids
        assert greedy(post, ids, 32)["tokens"] == list(ours)


@pytest.mark.shared
def test_a_real_model_writes_the_text_that_it_wrote_elsewhere(
    stories260k: Path, tmp_path: Path
) -> None:
    text = (stories260k / "expected-greedy-200.txt").read_text(encoding="utf-8")
    ids = json.loads((stories260k / "expected-greedy-200.json").read_text(encoding="utf-8"))
    with llama_server(export_gguf(stories260k, tmp_path / "stories.gguf").path) as post:
        found = greedy(post, [1], 200)
    assert found["tokens"] == ids
    assert found["content"].removeprefix(" ") == text  # a first word's space is shown there
