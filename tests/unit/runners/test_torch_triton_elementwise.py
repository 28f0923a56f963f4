"""Joints of the residual stream and gates in Triton, interpreted, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import support.triton_interpreter  # noqa: F401 - before the kernels
from llmserve.model.layers import RmsNorm
from llmserve.runners.torch_triton_elementwise import Norm, add_and_normalize, gate, normalize_rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of a number's size: a rounding to the type, for float32 those of the sum of squares too."""


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def normalized(x: Tensor, norm: Norm | None) -> Tensor:
    """In float64."""
    if norm is None:
        return x.double()
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return wide / root * (norm.weight.double() + norm.offset)


def assert_rounded(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    size = wanted.abs().clamp_min(1e-3)
    assert ((found.double() - wanted).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize(
    ("width", "dtype", "offset"),
    [(24, torch.float32, 0.0), (75, torch.bfloat16, 1.0), (160, torch.float16, 0.0)],
)
@pytest.mark.parametrize(("has_after", "has_before"), list(product([False, True], repeat=2)))
def test_a_joint_adds_and_normalizes(
    width: int, dtype: torch.dtype, offset: float, has_after: bool, has_before: bool
) -> None:
    stream, added = random(3, width, seed=1, dtype=dtype), random(3, width, seed=2, dtype=dtype)
    norms = [Norm(random(width, seed=seed, dtype=dtype), 1e-5, offset) for seed in (3, 4)]
    after, before = norms[0] if has_after else None, norms[1] if has_before else None
    old = stream.clone()
    new, read = add_and_normalize(stream, added, after=after, before=before)
    # What is added is rounded first, as the model's norm leaves it: the oracle rounds it too.
    put = normalized(added, after).to(dtype).double()
    margin = 2 * TOLERANCE[dtype] * put.abs()  # of what may fall on the other side of a half
    wanted = old.double() + put
    assert ((new.double() - wanted).abs() <= margin + TOLERANCE[dtype] * wanted.abs()).all()
    assert_rounded(read, normalized(new, before), dtype)
    assert torch.equal(stream, old), "another block may still read it"


def test_a_joint_without_a_sum_is_a_norm() -> None:
    stream = random(2, 40, seed=1)
    norm = Norm(random(40, seed=2), 1e-6, 0.0)
    new, read = add_and_normalize(stream, None, after=None, before=norm)
    assert new is stream
    assert_rounded(read, normalized(stream, norm), torch.float32)
    assert add_and_normalize(stream, None, after=None, before=None) == (stream, stream)


def test_rows_of_a_wider_array_are_normalized_where_they_lie() -> None:
    wide = random(4, 96, seed=1, dtype=torch.bfloat16)
    norm = RmsNorm(24, 1e-5)
    norm.weight = torch.nn.Parameter(random(24, seed=2, dtype=torch.bfloat16))
    part = wide[:, 48:72]
    with torch.no_grad():
        wanted = norm(part)
    found = normalize_rows(part, Norm(norm.weight, 1e-5, 0.0))
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("is_silu", [True, False], ids=["swiglu", "geglu-tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_gate_is_activated_and_multiplied(is_silu: bool, dtype: torch.dtype) -> None:
    both = random(3, 2 * 1100, seed=5, dtype=dtype)
    both[0, :6] = torch.tensor([-100.0, -30.0, -1e4, 100.0, 0.0, 3e4])
    x, y = both.double().chunk(2, dim=-1)
    gelu = torch.nn.functional.gelu(x, approximate="tanh")
    wanted = (x / (1 + torch.exp(-x)) if is_silu else gelu) * y
    found = gate(both, is_silu=is_silu)
    assert found.dtype == dtype
    wanted = wanted.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    error = (found.double() - wanted).abs()
    # 1 + e^-x near 1 leaves errors of the size of x in float32; float16 ends at 6e-5.
    assert (
        error <= TOLERANCE[dtype] * wanted.abs() + 3e-7 * (x * y).abs().clamp_max(1e2) + 4e-8
    ).all()


def test_no_rows_are_no_work() -> None:
    empty = torch.empty(0, 24)
    norm = Norm(torch.ones(24), 1e-5, 0.0)
    assert normalize_rows(empty, norm).shape == (0, 24)
    assert gate(empty, is_silu=True).shape == (0, 12)
