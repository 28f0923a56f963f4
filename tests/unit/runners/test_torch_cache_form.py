"""Keys and values in eight bits: the bits of the native runner's cache, and float8's bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.native.program import Number
from llmserve.native.reference.cache import stored
from llmserve.runners.torch_cache_form import CACHE_FORMS, choose_cache_form


def heads(count: int = 200) -> torch.Tensor:
    """Heads of many magnitudes, among them one of zeros and one that counts as zeros."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, 2, 24)) * 10.0 ** rng.uniform(-6, 6, (count, 2, 1))
    x[0, 0], x[1, 1] = 0.0, 1e-31
    return torch.from_numpy(x.astype(np.float32))


def test_int8_is_what_the_native_runner_keeps() -> None:
    form, x = CACHE_FORMS["int8"], heads()
    kept = form.decode(*form.encode(x))
    assert np.array_equal(kept.numpy(), stored(x.numpy(), Number.INT8))


def test_fp8_errs_by_half_a_unit_of_its_last_place() -> None:
    form, x = CACHE_FORMS["fp8"], heads()
    codes, scales = form.encode(x)
    wide, scale = x.double(), scales.double()[..., None]
    error = (form.decode(codes, scales).double() - wide).abs()
    # Three bits of mantissa; below 2^-6 of the scale steps of 2^-9; and roundings of float32.
    bound = (1 + 1e-6) * torch.maximum(wide.abs() * 2.0**-4, scale * 2.0**-10)
    assert (error <= bound + 1e-30).all(), "the last for the head that counts as zeros"
    peaks = codes.view(torch.float8_e4m3fn).float().abs().amax(-1)
    assert peaks.unique().tolist() == [0.0, 448.0]


@pytest.mark.parametrize("name", CACHE_FORMS)
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_reads_as_nan_and_no_other_does(
    name: str, strange: float
) -> None:
    x = heads(4)
    x[2, 1, 5] = strange
    kept = CACHE_FORMS[name].decode(*CACHE_FORMS[name].encode(x))
    is_nan = kept.isnan()
    assert is_nan[2, 1].all()
    assert int(is_nan.sum()) == 24


def test_auto_follows_the_folder() -> None:
    assert choose_cache_form("auto", dtype="bfloat16", folder_asks_int8=False) is None
    form = choose_cache_form("auto", dtype="bfloat16", folder_asks_int8=True)
    assert form is CACHE_FORMS["int8"]
    assert choose_cache_form("bfloat16", dtype="bfloat16", folder_asks_int8=True) is None
    assert choose_cache_form("fp8", dtype="float32", folder_asks_int8=False) is CACHE_FORMS["fp8"]


def test_another_float_than_the_arithmetics_is_refused() -> None:
    with pytest.raises(ConfigError, match="type of its arithmetic, float32; got bfloat16"):
        choose_cache_form("bfloat16", dtype="float32", folder_asks_int8=False)
