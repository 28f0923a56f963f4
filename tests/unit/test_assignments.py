from __future__ import annotations

import pytest

from llmserve.assignments import parse_assignments
from llmserve.errors import ConfigError


def test_values_keep_their_order_and_their_equals_signs() -> None:
    assert parse_assignments(["b=1", "a=x=y"], "--option") == {"b": "1", "a": "x=y"}
    assert parse_assignments([], "--option") == {}


@pytest.mark.parametrize("text", ["a", "a=", "=1", "="])
def test_half_an_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--option takes NAME=VALUE"):
        parse_assignments([text], "--option")


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a' twice"):
        parse_assignments(["a=1", "a=1"], "--option")
