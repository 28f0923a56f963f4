"""Keys and values in eight bits: one number scales the values of one head in one slot.

`int8` rounds to the nearest of 255 steps, as the native runner's cache does; `fp8` to float8_e4m3fn
(arXiv 2209.05433, section 3), which has three bits of mantissa: small values of a head keep more
of themselves, large ones less.

Shapes: KV key heads, D head_dim; leading axes are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["CACHE_FORMS", "CacheForm", "choose_cache_form"]

_SMALLEST = 1e-30
"""A head whose largest magnitude is no larger counts as zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheForm:
    """How a head's D values become codes of one byte and a float32 scale."""

    name: Literal["int8", "fp8"]
    """As `--kv-cache-dtype` says it."""
    stored: torch.dtype
    """Type of the codes in memory; fp8's are bits, which every operation of torch can move."""
    largest: float
    """The largest code."""

    def head_bytes(self, head_dim: int) -> int:
        """What one head of one token takes, its scale included."""
        return head_dim * self.stored.itemsize + torch.float32.itemsize

    def encode(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Heads [..., D] → codes [..., D] and scales [...].

        The scale is the head's largest magnitude divided by the largest code. A head that holds NaN
        or an infinity has NaN for its scale.
        """
        wide = heads.float()
        peak = wide.abs().amax(-1)
        is_zero = peak <= _SMALLEST
        inverse = self.largest / torch.where(is_zero, torch.inf, peak)
        is_known = peak.isfinite()
        numbers = torch.where(is_known[..., None], wide * inverse[..., None], 0.0)
        scales = torch.where(is_zero, 0.0, peak / self.largest)
        codes = numbers.round().to(torch.int8)
        if self.name == "fp8":
            codes = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
        return codes, torch.where(is_known, scales, torch.nan)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes [..., D] and scales [...] → float32 [..., D]."""
        numbers = codes if self.name == "int8" else codes.view(torch.float8_e4m3fn)
        return numbers.float() * scales[..., None]


CACHE_FORMS = {
    form.name: form
    for form in (
        CacheForm(name="int8", stored=torch.int8, largest=127.0),
        CacheForm(name="fp8", stored=torch.uint8, largest=448.0),
    )
}


def choose_cache_form(asked: str, *, dtype: str, folder_asks_int8: bool) -> CacheForm | None:
    """The form of the cache; None: keys and values are kept in the type of the arithmetic.

    Args:
        asked: `auto`: int8 where the folder asks for it, else the type of the arithmetic; or a form
            by its name.
        dtype: Type of the arithmetic.
        folder_asks_int8: Whether the model folder says that the cache is to be int8.

    Raises:
        ConfigError: another type than the arithmetic's.
    """
    if asked == "auto":
        return CACHE_FORMS["int8"] if folder_asks_int8 else None
    if asked in CACHE_FORMS:
        return CACHE_FORMS[asked]
    if asked != dtype:
        raise ConfigError(
            f"the torch runner keeps keys and values as auto, {', '.join(CACHE_FORMS)} or in the "
            f"type of its arithmetic, {dtype}; got {asked}: choose one of these, or --dtype {asked}"
        )
    return None
