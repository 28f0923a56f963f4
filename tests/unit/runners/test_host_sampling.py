"""Tokens from logits in the host's memory: the same with the C++ sampler and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmserve.runners import host_sampling
from llmserve.runners.host_sampling import HostSampler
from llmserve.runners.protocol import SamplingRow
from llmserve.runners.sampler import sample
from llmserve.sampling import SamplingParams

needs_kernels = pytest.mark.skipif(
    host_sampling.load_kernels() is None, reason="the kernels are not built"
)
ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 7, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logit_bias": {3: 50.0}, "logprobs": 2},
]


def make_rows() -> list[SamplingRow]:
    return [
        SamplingRow(
            params=SamplingParams(**params),
            seed=seed,
            choice_index=0,
            token_ids=[5, 6, 7],
            num_prompt_tokens=2,
        )
        for seed, params in enumerate(ROWS)
    ]


def make_logits() -> np.ndarray:
    return np.random.default_rng(4).normal(0, 3, (len(ROWS), 97)).astype(np.float32)


@needs_kernels
def test_what_is_drawn_is_what_numpy_draws() -> None:
    logits = make_logits()
    found, wanted = HostSampler().sample(logits, make_rows()), sample(logits, make_rows())
    assert found.token_ids.tolist() == wanted.token_ids.tolist()
    assert found.is_finite is None
    assert found.logprobs is not None
    assert found.logprobs[:3] == [None, None, None]
    assert found.logprobs[3] is not None
    np.testing.assert_array_equal(logits, make_logits(), "the logits were changed")


def test_without_kernels_numpy_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_sampling, "load_kernels", lambda: None)
    logits = make_logits()
    found, wanted = HostSampler().sample(logits, make_rows()), sample(logits, make_rows())
    assert found.token_ids.tolist() == wanted.token_ids.tolist()


@needs_kernels
def test_rows_that_cannot_be_used_are_told() -> None:
    logits = make_logits()
    logits[1, 50] = np.nan
    found = HostSampler().sample(logits, make_rows())
    assert found.is_finite is not None
    assert found.is_finite.tolist() == [True, False, True, True]


def test_plainly_greedy_rows_take_the_likeliest() -> None:
    logits = make_logits()
    logits[2, 50] = np.nan
    params = SamplingParams(temperature=0.0)
    rows = [
        SamplingRow(params=params, seed=0, choice_index=0, token_ids=[5], num_prompt_tokens=1)
        for _ in logits
    ]
    found, wanted = HostSampler().sample(logits, rows), sample(logits, rows)
    assert found.is_finite is not None
    assert wanted.is_finite is not None
    assert found.is_finite.tolist() == wanted.is_finite.tolist() == [True, True, False, True]
    assert found.token_ids[found.is_finite].tolist() == wanted.token_ids[wanted.is_finite].tolist()
