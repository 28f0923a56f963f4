"""Attention against a float64 reference; a cache filled step by step against whole rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.model.attention import CausalAttention, DenseCache
from support.variants import LLAMA

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 9, 4, 6


def tensors(num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_kv_heads)
    shapes = ((HEADS, 2.0), (num_kv_heads, 1.0), (num_kv_heads, 1.0))
    q, k, v = (
        scale * torch.randn(BATCH, TOKENS, heads, HEAD_DIM, generator=generator)
        for heads, scale in shapes
    )
    return q, k, v


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> Any:
    """Softmax of scaled products over what is seen, token by token, head by head, in float64."""
    q64, k64, v64 = (tensor.double().numpy() for tensor in (q, k, v))
    group = HEADS // k64.shape[2]
    out = np.empty_like(q64)
    for b, t, h in np.ndindex(BATCH, TOKENS, HEADS):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        scores = k64[b, seen, h // group] @ q64[b, t, h] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v64[b, seen, h // group]
    return out


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 1, 4, TOKENS, 20])
def test_causal_attention_equals_the_reference(num_kv_heads: int, window: int | None) -> None:
    q, k, v = tensors(num_kv_heads)
    config = dataclasses.replace(LLAMA, sliding_window=window)
    out = CausalAttention(config)(0, q, k, v)
    np.testing.assert_allclose(out.numpy(), reference(q, k, v, window), atol=2e-6)


def test_layers_without_the_window_see_all() -> None:
    q, k, v = tensors(2)
    config = dataclasses.replace(LLAMA, sliding_window=3, full_attention_layers=(1,))
    attend = CausalAttention(config)
    np.testing.assert_allclose(attend(0, q, k, v).numpy(), reference(q, k, v, 3), atol=2e-6)
    np.testing.assert_allclose(attend(1, q, k, v).numpy(), reference(q, k, v), atol=2e-6)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 1, 3, 1], [1, 8]], ids=str)
def test_cache_filled_in_steps_equals_the_reference(
    num_kv_heads: int, window: int | None, steps: list[int]
) -> None:
    q, k, v = tensors(num_kv_heads)
    full = () if window is None else (1,)
    config = dataclasses.replace(
        LLAMA, num_kv_heads=num_kv_heads, sliding_window=window, full_attention_layers=full
    )
    cache = DenseCache(config, batch_size=BATCH, max_len=TOKENS)
    outs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for size in steps:
        new = slice(cache.length, cache.length + size)
        for layer in range(config.num_layers):
            # Another layer's keys and values must stay apart.
            sign = 1 - 2 * layer
            outs[layer].append(cache(layer, q[:, new], sign * k[:, new], sign * v[:, new]))
    assert cache.length == TOKENS
    np.testing.assert_allclose(torch.cat(outs[0], 1).numpy(), reference(q, k, v, window), atol=2e-6)
    np.testing.assert_allclose(torch.cat(outs[1], 1).numpy(), reference(q, -k, -v), atol=2e-6)


def test_cache_refuses_more_tokens_than_it_holds() -> None:
    q, k, v = tensors(2)
    cache = DenseCache(LLAMA, batch_size=BATCH, max_len=TOKENS - 1)
    with pytest.raises(ConfigError, match="holds 8 tokens; 9 are needed"):
        cache(0, q, k, v)
    assert DenseCache(LLAMA).max_len == LLAMA.max_seq_len
