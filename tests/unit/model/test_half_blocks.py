"""Attention's projections and the feed-forward against their definitions, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.model.half_blocks import Attention, Mlp
from llmserve.model.layers import Linear
from support.variants import LLAMA


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as64(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().numpy()


def filled(module: torch.nn.Module) -> Any:
    """The module with random parameters."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=index + 1))
    return module


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "gelu", "gelu_tanh"])
def test_mlp_is_its_definition(activation: Any, bias: bool) -> None:
    mlp = filled(Mlp(dataclasses.replace(LLAMA, activation=activation, mlp_bias=bias), 0))
    x = 0.1 * random(5, 24)

    def apply(linear: Linear, values: Any) -> Any:
        shift = 0.0 if linear.bias is None else as64(linear.bias)
        return values @ as64(linear.weight).T + shift

    if activation in ("swiglu", "geglu_tanh"):
        gate, up = np.split(apply(mlp.gate_up_proj, as64(x)), 2, axis=-1)
        inner = (silu(gate) if activation == "swiglu" else gelu_tanh(gate)) * up
    else:
        inner = {"gelu": gelu, "gelu_tanh": gelu_tanh}[activation](apply(mlp.up_proj, as64(x)))
    np.testing.assert_allclose(as64(mlp(x)), apply(mlp.down_proj, inner), atol=2e-5)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["head", "full"])
def test_queries_and_keys_are_normalized_by_head_or_all_together(kind: Any, offset: float) -> None:
    config = dataclasses.replace(LLAMA, qk_norm=kind, norm_weight_offset=offset, norm_eps=1e-3)
    attention = filled(Attention(config, 0))
    seen = {}

    def attend(layer_index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.update(q=q, k=k, v=v)
        return q

    x = random(5, 24)
    attention(x, None, attend)
    q, k, v = np.split(as64(x) @ as64(attention.qkv_proj.weight).T, [24, 36], axis=-1)
    for name, flat, norm in (("q", q, attention.q_norm), ("k", k, attention.k_norm)):
        rows = flat.reshape(5, -1, 6) if kind == "head" else flat
        expected = rms_norm(rows, as64(norm.weight) + offset, 1e-3).reshape(5, -1, 6)
        np.testing.assert_allclose(as64(seen[name]), expected, atol=1e-5)
    np.testing.assert_allclose(as64(seen["v"]), v.reshape(5, -1, 6), atol=1e-5)
