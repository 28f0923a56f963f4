"""Eight-bit keys and values in Triton: rounding to codes, and codes as numbers for products.

The same codes as `torch_cache_form.py` makes, bit for bit. A float8_e4m3fn is made and read by
integer operations, since GPUs before compute capability 8.9 have no such type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .torch_cache import LayerCache

__all__ = ["cache_kind", "numbers_of", "to_codes"]

_KINDS = {torch.int8: 1, torch.uint8: 2}


def cache_kind(layer: LayerCache) -> int:
    """What kernels are told of the cache's form: 0 as computed, 1 int8, 2 fp8."""
    return 0 if layer.key_scales is None else _KINDS[layer.keys.dtype]


@triton.jit
def to_codes(x, KIND: tl.constexpr):
    """Heads [HEADS, WIDTH] in float32 → codes, and scales [HEADS]; the width is filled with 0."""
    largest: tl.constexpr = 127.0 if KIND == 1 else 448.0
    is_strange = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1) != 0  # NaN or an infinity
    x = tl.where(is_strange[:, None], 0.0, x)
    peak = tl.max(tl.abs(x), 1)
    is_zero = peak <= 1e-30
    numbers = x * tl.div_rn(largest, tl.where(is_zero, float("inf"), peak))[:, None]
    scales = tl.where(is_zero, 0.0, tl.div_rn(peak, largest))
    codes = _nearest(numbers).to(tl.int8) if KIND == 1 else _float8(numbers)
    return codes, tl.where(is_strange, float("nan"), scales)


@triton.jit
def numbers_of(codes, dtype: tl.constexpr, KIND: tl.constexpr):
    """What codes stand for, exactly: int8 as it is; fp8 divided by 256.

    The bits of a float8_e4m3fn, moved to where float16 has exponent and mantissa, are a float16.
    """
    if KIND == 2:
        bits = codes.to(tl.uint16)
        codes = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return codes.to(dtype)


@triton.jit
def _nearest(x):
    """The nearest whole number of |x| < 2^22, ties to even: what a sum with 1.5 * 2^23 keeps."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _float8(x):
    """Bits of the nearest float8_e4m3fn, ties to even, of |x| <= 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # exponents 127 to 7
    small = _nearest(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6: multiples of 2^-9
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
