"""An engine's settings: what cannot work is refused by name."""

from __future__ import annotations

import pytest

from llmserve.engine.config import EngineConfig, SpeculationConfig, StepCost
from llmserve.errors import ConfigError


def make_config(**changes: object) -> EngineConfig:
    return EngineConfig(**{"num_blocks": (8,), "max_seq_len": 16, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_size_that_is_no_positive_whole_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        make_config(block_size=value)
    with pytest.raises(ConfigError, match="num_blocks"):
        make_config(num_blocks=(4, value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": ()}, "num_blocks"),
        ({"policy": "lifo"}, "fcfs, priority or fair"),
        ({"tenant_weights": {"a": 0.0}}, "above 0"),
        (
            {"block_size": 4, "speculation": SpeculationConfig(method="ngram")},
            "under the block size",
        ),
    ],
)
def test_setting_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "oracle"}, "ngram or draft"),
        ({"method": "ngram", "num_draft_tokens": 0}, "1 to 15"),
        ({"method": "ngram", "num_draft_tokens": 16}, "1 to 15"),
        ({"method": "ngram", "min_ngram": 3, "max_ngram": 2}, "min_ngram"),
    ],
)
def test_speculation_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculationConfig(**changes)  # type: ignore[arg-type]


def test_cost_of_a_step_is_a_line() -> None:
    assert StepCost(base_s=1.0, token_s=0.5).seconds(4) == 3.0
    with pytest.raises(ConfigError, match="above 0"):
        StepCost(base_s=0.0, token_s=1.0)
