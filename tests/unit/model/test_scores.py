"""Capped and scaled attention against a float64 reference; uncapped, what the kernel gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.model.scores import Scores, soft_cap
from support.variants import GEMMA2, LLAMA

BATCH, HEADS, QUERIES, PLACES, WIDTH = 2, 6, 4, 7, 5


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: Any, scale: float, cap: float
) -> Any:
    """`hidden` [B, N, L]: what each query does not see; `cap` infinite: none."""
    q64, k64, v64 = (tensor.double().numpy() for tensor in (q, k, v))
    out = np.empty_like(q64)
    for b, h in np.ndindex(BATCH, HEADS):
        kv_head = h * k64.shape[1] // HEADS
        scores = q64[b, h] @ k64[b, kv_head].T * scale
        if math.isfinite(cap):
            scores = cap * np.tanh(scores / cap)
        weights = np.where(hidden[b], 0.0, np.exp(scores))
        out[b, h] = weights / weights.sum(-1, keepdims=True) @ v64[b, kv_head]
    return out


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "flags", "numbers"])
@pytest.mark.parametrize(("scale", "cap"), [(None, None), (0.9, None), (None, 0.5), (0.9, 2.0)])
def test_attention_is_its_definition(
    kv_heads: int, mask: str, scale: float | None, cap: float | None
) -> None:
    places = QUERIES if mask == "causal" else PLACES
    q = random(BATCH, HEADS, QUERIES, WIDTH, seed=0)
    k, v = (random(BATCH, kv_heads, places, WIDTH, seed=seed) for seed in (1, 2))
    hidden = np.zeros((BATCH, QUERIES, places), bool)
    if mask == "causal":
        hidden[:] = np.triu(np.ones((QUERIES, places)), 1)
    elif mask != "none":
        hidden = np.random.default_rng(0).random(hidden.shape) < 0.4
        hidden[..., 0] = False
        if mask == "flags":
            hidden[1] = hidden[0]
    given = {
        "flags": torch.from_numpy(~hidden[0]),
        "numbers": torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))[
            :, None
        ],
    }.get(mask)
    out = Scores(scale=scale, cap=cap).attend(q, k, v, mask=given, is_causal=mask == "causal")
    expected = reference(q, k, v, hidden, scale or WIDTH**-0.5, cap or math.inf)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)


def test_bfloat16_weighs_in_float32() -> None:
    q, k, v = (random(1, 1, 40, 8, seed=seed).bfloat16() for seed in range(3))
    out = Scores(cap=50.0).attend(q, k, v, is_causal=True)
    assert out.dtype == torch.bfloat16
    exact = Scores(cap=50.0).attend(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(out.float(), exact, atol=0.02, rtol=0.02)


def test_soft_cap_keeps_what_is_small_and_bounds_the_rest() -> None:
    x = torch.tensor([-1e9, -0.01, 0.0, 0.01, 1e9])
    torch.testing.assert_close(soft_cap(x, 30.0), torch.tensor([-30.0, -0.01, 0.0, 0.01, 30.0]))


def test_scores_of_a_model_are_its_settings() -> None:
    assert Scores.of(LLAMA) == Scores()
    assert Scores.of(GEMMA2) == Scores(scale=10**-0.5, cap=2.0)
