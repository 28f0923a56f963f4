"""Matrix attention against the model's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.model.attention import CausalAttention
from llmserve.training.attention import MatrixAttention
from support.variants import GEMMA2, LLAMA


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 32])
@pytest.mark.parametrize(("window", "scale"), [(None, None), (1, None), (5, None), (5, 0.7)])
def test_equals_the_models_attention_forward_and_backward(
    heads: int, kv_heads: int, tokens: int, window: int | None, scale: float | None
) -> None:
    config = dataclasses.replace(LLAMA, head_dim=8, sliding_window=window, attention_scale=scale)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, count, 8) for count in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    outputs, gradients = [], []
    for attend in (CausalAttention(config), MatrixAttention(config)):
        out = attend(0, *inputs)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, 4, 8, generator=generator) for _ in range(3))
    config = dataclasses.replace(LLAMA, head_dim=8)
    exact = CausalAttention(config)(0, q, k, v)
    rounded = MatrixAttention(config)(0, q, k.bfloat16(), v.bfloat16())
    assert rounded.dtype == torch.bfloat16
    # Eight bits of mantissa in scores, weights and sums of values of size one.
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_capped_scores_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="attention_softcap"):
        MatrixAttention(GEMMA2)
