"""What may be asked of the sampler."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llmserve.errors import RequestError
from llmserve.limits import Limits
from llmserve.sampling import MAX_SEED, SamplingParams

ACCEPTED: list[dict[str, object]] = [
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"temperature": 0},
    {"temperature": 100.0, "top_k": -1},
    {"top_p": 1e-300, "min_p": 1.0, "typical_p": 1e-300},
    {"repetition_penalty": 10.0, "presence_penalty": -2.0, "frequency_penalty": 2},
    {"allowed_token_ids": (3, 4), "banned_token_ids": (4,)},
    {"allowed_token_ids": (3, 4), "stop_token_ids": (3,), "min_tokens": 1},
    {"allowed_token_ids": (3,), "stop_token_ids": (3,)},
    {"logit_bias": {0: -100, 7: 100.0}, "seed": MAX_SEED},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_values_inside_their_ranges_are_accepted(settings: dict[str, object]) -> None:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    assert {name: getattr(params, name) for name in settings} == settings


REFUSED: list[tuple[str, dict[str, object]]] = [
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": True}),
    ("min_tokens", {"max_tokens": 0, "min_tokens": 1}),
    ("n", {"n": 0}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": "1"}),
    ("top_k", {"top_k": -2}),
    ("top_p", {"top_p": 0.0}),
    ("min_p", {"min_p": 1.01}),
    ("typical_p", {"typical_p": 0.0}),
    ("typical_p", {"typical_p": 1.5}),
    ("typical_p", {"typical_p": None}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -math.inf}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logit_bias", {"logit_bias": {-1: 0.0}}),
    ("logit_bias", {"logit_bias": {1: 100.5}}),
    ("allowed_token_ids", {"allowed_token_ids": ()}),
    ("allowed_token_ids", {"allowed_token_ids": (-1,)}),
    ("allowed_token_ids", {"allowed_token_ids": (2, 3), "banned_token_ids": (3, 2, 1)}),
    (
        "min_tokens",
        {"allowed_token_ids": (2, 3), "banned_token_ids": (3,), "stop_token_ids": (2,)}
        | {"min_tokens": 1},
    ),
    ("banned_token_ids", {"banned_token_ids": (1.0,)}),
    ("stop_token_ids", {"stop_token_ids": (-3,)}),
    ("stop", {"stop": ("",)}),
    ("logprobs", {"logprobs": -1}),
    ("prompt_logprobs", {"prompt_logprobs": False}),
    ("seed", {"seed": MAX_SEED + 1}),
]


@pytest.mark.parametrize(("param", "settings"), REFUSED, ids=str)
def test_values_outside_are_refused_by_name(param: str, settings: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**settings)  # type: ignore[arg-type]
    assert caught.value.param == param


BOUNDED: list[tuple[str, str, object, object]] = [
    ("n", "max_choices", 16, 17),
    ("stop", "max_stop_strings", ("a",) * 16, ("a",) * 17),
    ("stop", "max_stop_chars", ("a" * 256,), ("a" * 257,)),
    ("stop_token_ids", "max_stop_token_ids", tuple(range(64)), tuple(range(65))),
    ("logprobs", "max_logprobs", 20, 21),
    ("prompt_logprobs", "max_logprobs", 20, 21),
    ("logit_bias", "max_logit_bias", dict.fromkeys(range(300), 1.0), dict.fromkeys(range(301), 1)),
    ("allowed_token_ids", "max_allowed_token_ids", tuple(range(4096)), tuple(range(4097))),
    ("banned_token_ids", "max_banned_token_ids", tuple(range(300)), tuple(range(301))),
]


@pytest.mark.parametrize(("param", "limit", "most", "above"), BOUNDED, ids=lambda v: str(v)[:24])
def test_limits_hold_for_each_list_and_count(
    param: str, limit: str, most: object, above: object
) -> None:
    limits = Limits()
    SamplingParams(**{param: most}).check_limits(limits)  # type: ignore[arg-type]
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{param: above}).check_limits(limits)  # type: ignore[arg-type]
    assert caught.value.param == param
    SamplingParams(**{param: above}).check_limits(  # type: ignore[arg-type]
        dataclasses.replace(limits, **{limit: 5000})
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {9: 1.0}},
        {"stop_token_ids": (1, 9)},
        {"allowed_token_ids": (1, 9)},
        {"banned_token_ids": (9,)},
    ],
    ids=str,
)
def test_ids_beyond_the_vocabulary_are_refused(settings: dict[str, object]) -> None:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    params.check_token_ids(10)
    with pytest.raises(RequestError, match="the id 9") as caught:
        params.check_token_ids(9)
    assert caught.value.param == next(iter(settings))


def test_a_ban_of_the_whole_vocabulary_is_refused() -> None:
    params = SamplingParams(banned_token_ids=(2, 1, 0, 0))
    params.check_token_ids(4)
    with pytest.raises(RequestError, match="all 3 ids"):
        params.check_token_ids(3)
