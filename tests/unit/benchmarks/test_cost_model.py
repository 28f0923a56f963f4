"""What a step costs, by hand, and cost models as text and as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmserve.benchmarks.cost_model import (
    CostModel,
    features,
    load_cost_model,
    parse_cost_model,
    save_cost_model,
)
from llmserve.errors import ConfigError
from llmserve.runners.protocol import Batch


def make_batch(*spans: tuple[int, int], num_rounds: int = 1) -> Batch:
    """A step that computes the tokens `start`..`stop - 1` of each sequence."""
    lengths = [stop - start for start, stop in spans]
    return Batch(
        token_ids=np.zeros(sum(lengths), dtype=np.int64),
        positions=np.concatenate([np.arange(start, stop) for start, stop in spans]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
        context_lens=np.array([stop for _, stop in spans]),
        groups=[],
        logits_indices=np.cumsum(lengths) - 1,
        sampling=[],
        num_rounds=num_rounds,
    )


# Two decodes, at the 10th and at the first token, and the tokens 4, 5 and 6 of a prompt.
BATCH = make_batch((9, 10), (0, 1), (4, 7))


def test_features_are_counted_as_defined() -> None:
    contexts = 10 + 1 + 7
    pairs = 10 + 1 + (5 + 6 + 7)
    assert features(BATCH) == (1, 5, 3, contexts, pairs, 1)


@pytest.mark.parametrize("num_rounds", [1, 2, 5])
def test_rounds_have_the_features_of_as_many_steps_in_one(num_rounds: int) -> None:
    """A sequence of 10 tokens and one of 3, whose next tokens are drawn."""
    steps = [
        features(make_batch((9 + number, 10 + number), (2 + number, 3 + number)))
        for number in range(num_rounds)
    ]
    *of_rounds, num_steps = np.sum(steps, axis=0).tolist()
    assert num_steps == num_rounds
    batch = make_batch((9, 10), (2, 3), num_rounds=num_rounds)
    assert features(batch) == (*of_rounds, 1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("base_ms=3", 3e-3),
        ("token_us=10", 5 * 10e-6),
        ("seq_us=7", 3 * 7e-6),
        ("context_ns=100", 18 * 100e-9),
        ("pair_ns=2", 29 * 2e-9),
        ("step_ms=4", 4e-3),
        ("base_ms=1,token_us=1,seq_us=1,context_ns=1,pair_ns=1,step_ms=2", 3e-3 + 8e-6 + 47e-9),
    ],
)
def test_step_costs_the_sum_of_its_parts(text: str, seconds: float) -> None:
    assert parse_cost_model(text).seconds(BATCH) == pytest.approx(seconds, rel=1e-12)


def test_text_is_read_back() -> None:
    cost = CostModel(
        base_s=0.0105, token_s=1.5e-5, sequence_s=2e-6, context_s=4e-8, pair_s=1e-9, step_s=3e-4
    )
    assert str(cost) == "base_ms=10.5,token_us=15,seq_us=2,context_ns=40,pair_ns=1,step_ms=0.3"
    assert parse_cost_model(str(cost)).coefficients == pytest.approx(cost.coefficients)


def test_file_is_read_back_with_all_digits(tmp_path: Path) -> None:
    cost = CostModel(base_s=1 / 3, token_s=1e-5 / 7)
    path = tmp_path / "costs.json"
    save_cost_model(path, cost, {"model": "m"})
    assert load_cost_model(path).coefficients == pytest.approx(cost.coefficients, rel=1e-15)
    assert json.loads(path.read_text())["measured"] == {"model": "m"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_ms", "is like base_ms=10"),
        ("", "is like base_ms=10"),
        ("base_ms=1,base_ms=2", "each name once"),
        ("base_ms=ten", "base_ms must be a number"),
        (
            "base_s=1",
            "names base_s; known: base_ms, token_us, seq_us, context_ns, pair_ns, step_ms",
        ),
        ("base_ms=-1", "below 0, got base_ms=-1"),
        ("token_us=nan", "below 0, got token_us=nan"),
        ("token_us=inf", "got token_us=inf"),
        ("base_ms=0,token_us=0", "must be above 0"),
    ],
)
def test_text_that_is_no_cost_model_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cost_model(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read a cost model"),
        ("[1]", "must hold a JSON object"),
        ('{"base_ms": "1"}', "base_ms must be a number"),
        ('{"base_ms": true}', "base_ms must be a number"),
        ('{"base": 1}', "names base; known"),
        ('{"base_ms": NaN}', "below 0"),
        ("{}", "must be above 0"),
    ],
)
def test_file_that_is_no_cost_model_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_cost_model(path)


def test_missing_file_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="or fit:MODEL_FOLDER"):
        load_cost_model(tmp_path / "none.json")
