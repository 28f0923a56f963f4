"""What llguidance makes of grammars, against other programs' idea of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.errors import RequestError
from llmserve.runners.sampler import unpack_mask
from llmserve.text.tokenizer import Tokenizer
from support.engines import make_info
from support.models import make_model_folder

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_model_folder(tmp_path_factory.mktemp("grammar") / "tiny"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, make_info(vocab_size=330, eos_token_ids=(0,)))


def write(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, seed: int) -> str:
    """A text at random among those that the masks allow, its end as soon as it may be."""
    matcher = compiler.compile(grammar).copy()
    generator = random.Random(seed)
    made: list[int] = []
    while True:
        ids = np.flatnonzero(unpack_mask(matcher.mask(), 330)).tolist()
        assert ids, matcher.error()
        assert max(ids) < 320, "an id that no token has"
        if 0 in ids or len(made) > 300:
            return tokenizer.decode([*tokenizer.encode("x"), *made]).removeprefix("x")
        made.append(generator.choice(ids))
        matcher.advance(made[-1:])


@pytest.mark.parametrize("seed", range(8))
def test_json_schema(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "size": {"type": "integer", "minimum": 3, "maximum": 40},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        },
        "required": ["name", "size", "tags"],
        "additionalProperties": False,
        "$defs": {"tag": {"enum": ["a", "ü", "日"]}},
    }
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    value = json.loads(write(compiler, tokenizer, grammar, seed))
    assert list(value) == ["name", "size", "tags"]
    assert len(value["name"]) <= 6
    assert 3 <= value["size"] <= 40
    assert set(value["tags"]) <= {"a", "ü", "日"}
    assert len(value["tags"]) <= 3


@pytest.mark.parametrize("pattern", [r"[a-c]{3}[0-9]+x", r"(ab|ü日)+ 🙂", r"[xyü]{2,4}-[^a-z]"])
def test_regex(compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(5):
        text = write(compiler, tokenizer, Grammar(GrammarKind.REGEX, pattern), seed)
        assert re.fullmatch(pattern, text)


def test_choice(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no", 'say "ü"', "日本\n🙂"]
    grammar = Grammar(GrammarKind.CHOICE, json.dumps(choices, ensure_ascii=False))
    texts = {write(compiler, tokenizer, grammar, seed) for seed in range(40)}
    assert texts == set(choices)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(GrammarKind.LARK, 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/'),
        Grammar(GrammarKind.GBNF, 'root ::= n ("+" n)*\nn ::= [0-9] [0-9]?'),
    ],
    ids=lambda grammar: grammar.kind.value,
)
def test_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar) -> None:
    for seed in range(5):
        text = write(compiler, tokenizer, grammar, seed)
        assert re.fullmatch(r"\d+(\+\d+)*", text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type": 5}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("json_schema", "{"),
        ("json_schema", '{"type": "string", "pattern": "("}'),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}'),
        ("regex", "("),
        ("regex", "(?=a)b"),
        ("regex", "(?:" * 500 + "a" + ")" * 500 + "{9999}"),
        ("lark", "start: missing"),
        ("lark", ""),
        ("gbnf", "root ::= ("),
    ],
)
def test_bad_grammars_are_refused_in_a_line(
    compiler: GrammarCompiler, kind: str, text: str
) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(Grammar(GrammarKind(kind), text))
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_copy_goes_its_own_way(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Grammar(GrammarKind.CHOICE, '["ab", "cd"]'))
    other = matcher.copy()
    before = matcher.mask().tobytes()
    other.advance(tokenizer.encode("a", add_special_tokens=False)[:1])
    assert matcher.mask().tobytes() == before
    assert other.mask().tobytes() != before


def test_a_real_tokenizer_with_spaces_before_texts(stories260k: Path) -> None:
    """A Llama tokenizer writes a space before a text: none gets into what is fixed."""
    tokenizer = Tokenizer.load(stories260k)
    compiler = GrammarCompiler(tokenizer, make_info(vocab_size=512, eos_token_ids=(2,)))
    matcher = compiler.compile(Grammar(GrammarKind.CHOICE, '["{\\"name\\": 1}"]'))
    made: list[int] = []
    while not unpack_mask(matcher.mask(), 512)[2]:
        made.append(int(np.flatnonzero(unpack_mask(matcher.mask(), 512))[0]))
        matcher.advance(made[-1:])
    assert tokenizer.decode([*tokenizer.encode("x"), *made]) == 'x{"name": 1}'
