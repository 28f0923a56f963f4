"""Every layer against its definition, written out in numpy and float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.config import RopeScaling
from llmserve.model.layers import (
    LayerNorm,
    Linear,
    RmsNorm,
    RotaryTable,
    rotary_frequencies,
    rotate,
    sinusoids,
)
from support.variants import LLAMA

TOLERANCE = 2e-6  # float32 sums of some dozens of terms of size 1


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


def test_rms_norm_is_its_definition() -> None:
    norm = filled(RmsNorm(24, 1e-3))
    x = random(5, 24)
    expected = as64(x) / np.sqrt((as64(x) ** 2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(as64(norm(x)), expected * as64(norm.weight), atol=TOLERANCE)


def test_rms_norm_of_bfloat16_sums_in_float32() -> None:
    norm = filled(RmsNorm(512, 1e-5)).bfloat16()
    x = (300 * random(4, 512)).bfloat16()
    y = as64(x) / np.sqrt((as64(x) ** 2).mean(-1, keepdims=True) + 1e-5) * as64(norm.weight)
    np.testing.assert_allclose(as64(norm(x)), y, rtol=2**-6)  # two roundings to 8 bits


def test_offset_of_rms_norm_is_added_to_the_weight_in_float32() -> None:
    norm = filled(RmsNorm(24, 1e-3, 1.0)).bfloat16()
    with torch.no_grad():
        norm.weight.mul_(2**-9)  # gone if 1 + weight were rounded to 8 bits
    x = random(5, 24)
    expected = as64(x) / np.sqrt((as64(x) ** 2).mean(-1, keepdims=True) + 1e-3)
    expected *= 1 + as64(norm.weight)
    np.testing.assert_allclose(as64(norm(x)), expected, atol=TOLERANCE)


def test_layer_norm_is_its_definition() -> None:
    norm = filled(LayerNorm(24, 1e-3))
    x = random(5, 24) + 3
    centred = as64(x) - as64(x).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    expected = expected * as64(norm.weight) + as64(norm.bias)
    np.testing.assert_allclose(as64(norm(x)), expected, atol=TOLERANCE)


def test_linear_is_its_definition() -> None:
    linear = filled(Linear(24, 10, bias=True))
    x = random(5, 24)
    expected = as64(x) @ as64(linear.weight).T + as64(linear.bias)
    np.testing.assert_allclose(as64(linear(x)), expected, atol=4 * TOLERANCE)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    config = dataclasses.replace(LLAMA, head_dim=6, rope_theta=100.0)
    heads = random(5, 3, 6)  # [T, heads, D]
    positions = torch.tensor([0, 1, 7, 30, 47])
    turned = as64(rotate(heads, RotaryTable(config).rotation(positions, torch.float32)))
    for t, position in enumerate(positions.tolist()):
        for i in range(3):
            angle = position * 100.0 ** (-2 * i / 6)
            pair = as64(heads)[t, :, i] + 1j * as64(heads)[t, :, i + 3]
            expected = pair * np.exp(1j * angle)
            np.testing.assert_allclose(turned[t, :, i], expected.real, atol=2e-5)
            np.testing.assert_allclose(turned[t, :, i + 3], expected.imag, atol=2e-5)


def test_part_of_a_head_is_turned_as_a_head_of_that_width() -> None:
    part = dataclasses.replace(LLAMA, head_dim=10, rotary_dim=6)
    heads, positions = random(5, 3, 10), torch.tensor([0, 1, 7, 30, 47])
    turned = rotate(heads, RotaryTable(part).rotation(positions, torch.float32))
    whole = RotaryTable(LLAMA).rotation(positions, torch.float32)
    assert torch.equal(turned[..., :6], rotate(heads[..., :6].contiguous(), whole))
    assert torch.equal(turned[..., 6:], heads[..., 6:])


def test_local_frequencies_have_a_base_of_their_own_and_no_scaling() -> None:
    plain = dataclasses.replace(LLAMA, rope_theta=100.0)
    scaled = RopeScaling(kind="linear", factor=4.0)
    both = dataclasses.replace(LLAMA, rope_scaling=scaled, sliding_window=4, local_rope_theta=100.0)
    assert torch.equal(rotary_frequencies(both, is_local=True), rotary_frequencies(plain))
    torch.testing.assert_close(4 * rotary_frequencies(both), rotary_frequencies(LLAMA))


def test_rotated_products_depend_on_the_distance_alone() -> None:
    table = RotaryTable(LLAMA)
    q, k = random(1, 1, 6), random(1, 1, 6, seed=1)

    def product(first: int, second: int) -> float:
        turned = [
            rotate(vector, table.rotation(torch.tensor([place]), torch.float32))
            for vector, place in ((q, first), (k, second))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(40, 35), abs=1e-5)


def test_linear_scaling_divides_every_frequency() -> None:
    scaled = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    torch.testing.assert_close(4 * rotary_frequencies(scaled), rotary_frequencies(LLAMA))


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones() -> None:
    config = dataclasses.replace(LLAMA, head_dim=64, rope_theta=500_000.0, max_seq_len=128)
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=64)
    plain = as64(rotary_frequencies(config))
    scaled = as64(rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling)))
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 64 / 4, wavelength > 64 / 1
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    smooth = (64 / wavelength[between] - 1) / (4 - 1)
    expected = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-5)
    assert short.any()
    assert long.any()
    assert between.any()


def test_table_grows_to_positions_beyond_its_first_rows() -> None:
    long = dataclasses.replace(LLAMA, max_seq_len=20_000)
    table = RotaryTable(long)
    positions = torch.tensor([3, 19_999])
    cos, signed_sin = table.rotation(positions, torch.float32)  # [T, 1, 1 or 2, D/2]
    angles = positions[:, None] * rotary_frequencies(long)
    torch.testing.assert_close(cos[:, 0, 0], angles.cos(), rtol=0, atol=0)
    torch.testing.assert_close(signed_sin[:, 0, 0], -angles.sin(), rtol=0, atol=0)
    torch.testing.assert_close(signed_sin[:, 0, 1], angles.sin(), rtol=0, atol=0)
    with pytest.raises(IndexError):
        table.rotation(torch.tensor([20_000]), torch.float32)


def test_sinusoids_are_their_definition() -> None:
    positions = torch.tensor([0, 1, 40])
    rows = as64(sinusoids(positions, 8))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert rows[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert rows[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_of_rms_norm_are_those_of_torchs(offset: float) -> None:
    norm = filled(RmsNorm(24, 1e-3, offset))
    x, grad = random(2, 5, 24).requires_grad_(), random(2, 5, 24, seed=9)
    mine = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight)]
    y = torch.nn.functional.rms_norm(exact[0], (24,), exact[1] + offset, 1e-3)
    for one, other in zip(mine, torch.autograd.grad(y, exact, grad.double()), strict=True):
        np.testing.assert_allclose(as64(one), as64(other), atol=10 * TOLERANCE)


def test_rms_norm_has_the_same_bits_with_and_without_gradients() -> None:
    norm, x = filled(RmsNorm(24, 1e-3)), random(5, 24)
    with torch.no_grad():
        plain = norm(x)
    assert torch.equal(norm(x), plain)


def test_frozen_weight_of_rms_norm_gets_no_gradient() -> None:
    norm, x = filled(RmsNorm(24, 1e-3)).requires_grad_(False), random(5, 24).requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None
