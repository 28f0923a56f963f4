"""A real small model held to a schema: valid on every runner, and the same text on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.runners.registry import load_runner
from llmserve.startup import EngineOptions, start_engine
from llmserve.text.tokenizer import Tokenizer
from support.engines import make_request, run, tokens_by_choice

pytest.importorskip("llguidance")
pytest.importorskip(
    "llmserve.native._kernels", reason="the C++ extension is not built in this environment"
)
pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*manifest:UserWarning"),
]

PROMPT = "Once upon a time, there was a girl named"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "likes": {
            "type": "array",
            "items": {"type": "string", "maxLength": 15},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def texts(folder: Path, runner_name: str) -> list[str]:
    from llmserve.engine.grammar_compiler import GrammarCompiler

    tokenizer = Tokenizer.load(folder)
    runner = load_runner(runner_name, Checkpoint.open(folder), threads=1)
    engine = start_engine(runner, EngineOptions(max_batched_tokens=64))
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
    matcher = GrammarCompiler(tokenizer, runner.info).compile(grammar)
    prompt = tokenizer.encode(PROMPT)
    for index in range(6):
        changes: dict[str, Any] = {"temperature": float(index > 0), "seed": index}
        request = make_request(f"r{index}", prompt, grammar=grammar, max_tokens=200, **changes)
        engine.add_request(request, matcher)
    made = tokens_by_choice(run(engine))
    runner.close()
    return [
        tokenizer.decode([*prompt, *ids]).removeprefix(PROMPT) for _, ids in sorted(made.items())
    ]


def test_every_text_fits_the_schema_and_runners_agree(stories260k: Path) -> None:
    found = texts(stories260k, "native")
    for text in found:
        value = json.loads(text)
        assert list(value) == ["name", "age", "likes"]
        assert 1 <= value["age"] <= 99
        assert 1 <= len(value["likes"]) <= 3
    assert len(set(found)) > 3
    assert texts(stories260k, "torch") == found
