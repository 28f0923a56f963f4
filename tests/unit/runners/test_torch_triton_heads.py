"""Norm, rotation and cache write of a step's heads in Triton, interpreted, against torch's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import support.triton_interpreter  # noqa: F401 - before the kernels
from llmserve.model.layers import RmsNorm, RotaryTable, rotate
from llmserve.runners.cache_groups import LayerGroup
from llmserve.runners.torch_cache import PagedCache
from llmserve.runners.torch_cache_form import CACHE_FORMS
from llmserve.runners.torch_triton_elementwise import Norm
from llmserve.runners.torch_triton_heads import HeadNorms, keep_heads
from support.variants import LLAMA

POSITIONS = torch.tensor([0, 7, 31, 5, 12])
SLOTS = torch.tensor([30, 2, 17, 3, 8])


def make_cache(
    num_kv_heads: int, head_dim: int, dtype: torch.dtype, form: str | None
) -> PagedCache:
    return PagedCache(
        [LayerGroup(window=None, layers=(0,))], num_blocks=(2,), block_size=16,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=torch.device("cpu"),
        form=None if form is None else CACHE_FORMS[form],
    )  # fmt: skip


def make_heads(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Queries, keys and values, as they lie in the output of the joined projection."""
    generator = torch.Generator().manual_seed(head_dim)
    counts = [num_heads, num_kv_heads, num_kv_heads]
    qkv = torch.randn(len(POSITIONS), sum(counts), head_dim, generator=generator).to(dtype)
    return torch.split(qkv, counts, dim=1)


def make_norm(width: int, offset: float, dtype: torch.dtype, seed: int) -> RmsNorm:
    norm = RmsNorm(width, 1e-5, offset)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(seed)) + 1 - offset
    norm.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return norm


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary", "offset", "dtype"),
    [
        ((4, 2), 64, 64, None, torch.float32),
        ((3, 1), 80, 32, None, torch.float32),
        ((5, 5), 6, 6, 0.0, torch.float32),
        ((40, 2), 96, 2, 1.0, torch.float32),
        ((6, 2), 128, 128, 1.0, torch.bfloat16),
        ((2, 1), 16, 8, None, torch.float16),
    ],
)
def test_equals_torchs_operations(
    heads: tuple[int, int], head_dim: int, rotary: int, offset: float | None, dtype: torch.dtype
) -> None:
    config = dataclasses.replace(LLAMA, head_dim=head_dim, rotary_dim=rotary)
    rotation = RotaryTable(config).rotation(POSITIONS, dtype)
    q, k, v = make_heads(*heads, head_dim, dtype)
    wanted_q, wanted_k, norms = q, k, None
    if offset is not None:
        by_torch = [make_norm(head_dim, offset, dtype, seed) for seed in (1, 2)]
        wanted_q, wanted_k = by_torch[0](q), by_torch[1](k)
        norms = HeadNorms(*(Norm(norm.weight, norm.eps, offset) for norm in by_torch))
    wanted_q, wanted_k = rotate(wanted_q, rotation), rotate(wanted_k, rotation)
    cache = make_cache(heads[1], head_dim, dtype, None)
    out = keep_heads(q, k, v, cache.layers[0], SLOTS, rotation, norms)
    # torch rounds what a norm and a product give; here the sum alone is rounded.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    for found, wanted in ((out, wanted_q), (cache.keys[0][SLOTS], wanted_k)):
        assert found.dtype == dtype
        atol = tolerance * float(wanted.float().abs().max())
        torch.testing.assert_close(found.float(), wanted.float(), atol=atol, rtol=0)
    assert torch.equal(cache.values[0][SLOTS], v)
    others = [slot for slot in range(33) if slot not in SLOTS]
    assert not cache.keys[0][others].any()
    assert not cache.values[0][others].any()


@pytest.mark.parametrize("form", CACHE_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_the_plain_forms_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    q, k, v = make_heads(4, 3, 72, dtype)
    k[0, 0], k[1, 1], k[2, 2, 0] = 0.0, 1e-31, torch.inf
    v[3, 0, 1], v[4] = torch.nan, v[4] * 1e-4
    v[1] *= torch.logspace(-6, 3, 72).to(dtype)
    cache, plain = (make_cache(3, 72, dtype, form) for _ in range(2))
    assert keep_heads(q, k, v, cache.layers[0], SLOTS) is q
    plain.write(0, SLOTS, k, v)
    for found, wanted in zip(cache.layers[0], plain.layers[0], strict=True):
        assert found is not None
        assert wanted is not None
        assert torch.equal(
            torch.nan_to_num(found.float(), 9.0), torch.nan_to_num(wanted.float(), 9.0)
        )


def test_every_float8_is_made() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]  # not NaN
    numbers = codes.view(torch.float8_e4m3fn).float()
    between = (numbers[:-1] + numbers[1:]) / 2  # ties
    x = torch.cat((numbers, between, between * (1 + 2.0**-20), between * (1 - 2.0**-20)))
    x = torch.cat((x, torch.full((-len(x) % 40,), 448.0))).view(5, -1, 8)
    x[..., 0] = 448.0  # so that each head's scale is 1
    cache = make_cache(x.shape[1], 8, torch.float32, "fp8")
    keep_heads(x, x, x, cache.layers[0], SLOTS)
    assert torch.equal(cache.keys[0][SLOTS], x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("form", [None, "int8"])
def test_no_other_slot_is_written(form: str | None) -> None:
    q, k, v = make_heads(2, 1, 8, torch.float32)
    cache = make_cache(1, 8, torch.float32, form)
    keep_heads(q, k, v, cache.layers[0], SLOTS)
    for pool in filter(lambda pool: pool is not None, cache.layers[0]):
        assert pool[SLOTS].any()
        pool[SLOTS] = 0
        assert not pool.any()
