from __future__ import annotations

import json

import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.errors import ConfigError
from llmserve.speculative_config import parse_speculation


def test_every_key_reaches_its_setting() -> None:
    text = (
        '{"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_min": 3,'
        ' "prompt_lookup_max": 5, "always": true}'
    )
    found = parse_speculation(text)
    assert found.config == SpeculationConfig(
        method="ngram", num_draft_tokens=7, min_ngram=3, max_ngram=5, is_always_on=True
    )
    assert found.draft_model is None
    found = parse_speculation('{"method": "draft", "model": "run/small"}')
    assert found.config == SpeculationConfig(method="draft")
    assert found.draft_model == "run/small"


def test_a_longest_run_below_the_shortest_one_by_default_lowers_it() -> None:
    config = parse_speculation('{"method": "ngram", "prompt_lookup_max": 1}').config
    assert (config.min_ngram, config.max_ngram) == (1, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs the method ngram or draft"),
        ({"method": "eagle"}, "got 'eagle'"),
        ({"method": "ngram", "num_tokens": 3}, "no key 'num_tokens'; known: method, num_spec"),
        ({"method": "ngram", "num_speculative_tokens": "3"}, "must be a whole number, got '3'"),
        ({"method": "ngram", "num_speculative_tokens": True}, "must be a whole number"),
        ({"method": "ngram", "num_speculative_tokens": 16}, "1 to 15"),
        ({"method": "ngram", "always": 1}, "always must be true or false"),
        ({"method": "ngram", "model": "x"}, "model is for the method draft, not ngram"),
        ({"method": "draft"}, "the draft model's folder"),
        ({"method": "draft", "model": ""}, "the draft model's folder"),
        ({"method": "draft", "model": "x", "prompt_lookup_min": 1}, "for the method ngram"),
        ({"method": "ngram", "prompt_lookup_min": 5}, "max_ngram"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_speculation(json.dumps(values))


@pytest.mark.parametrize("text", ["", "ngram", "[]", '{"method": "ngram", "method": "draft"}'])
def test_what_is_no_object_is_refused_naming_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--speculative-config"):
        parse_speculation(text)
