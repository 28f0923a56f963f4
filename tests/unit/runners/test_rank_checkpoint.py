"""A rank's part of a folder, quantized or not, against the part of the whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.quant.groups import QuantizedLinear, quantize_rtn
from llmserve.runners.rank_checkpoint import RankCheckpoint, cut_linear
from llmserve.runners.tensor_parallel import Cut, Rank, cut_of
from support.quantized_folders import write_quantized
from support.variants import QWEN2, random_tensors

WIDE = dataclasses.replace(QWEN2, hidden_size=64, head_dim=16, intermediate_size=64)
"""As wide as bitsandbytes asks for."""


@pytest.mark.parametrize(
    "scheme", [None, "int4", "int8", pytest.param("nf4", marks=pytest.mark.bnb)]
)
@pytest.mark.parametrize("count", [2, 4])
def test_parts_are_those_of_the_whole(tmp_path: Path, scheme: str | None, count: int) -> None:
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    save_model(tmp_path / "model", WIDE, random_tensors(WIDE))
    folder = tmp_path / "model"
    if scheme is not None:
        folder = tmp_path / "quantized"
        write_quantized(tmp_path / "model", folder, scheme)  # type: ignore[arg-type]
    whole = Checkpoint.open(folder)
    for rank in (Rank(index, count) for index in range(count)):
        part = RankCheckpoint(whole, rank)
        assert part.fingerprint == whole.fingerprint
        for name in whole.names():
            wanted = cut_of(name, whole.shape_of(name), WIDE, rank).of(whole.float32(name))
            np.testing.assert_array_equal(part.float32(name), wanted)
            if whole.is_quantized(name):
                linear = part.linear(name)
                value = linear if isinstance(linear, np.ndarray) else linear.dequantize()
                np.testing.assert_array_equal(value, wanted)
            else:
                np.testing.assert_array_equal(part.stored(name).data, wanted)


def linear(group_size: int | None, *, is_symmetric: bool = True) -> QuantizedLinear:
    weight = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)
    return quantize_rtn(weight, 4, group_size, is_symmetric=is_symmetric)


@pytest.mark.parametrize("group_size", [None, 4, 12])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_whole_groups_stay_integers(group_size: int | None, is_symmetric: bool) -> None:
    whole = linear(group_size, is_symmetric=is_symmetric)
    for cut in (Cut(rows=slice(2, 5)), Cut(columns=slice(0, 12)), Cut(columns=slice(12, 24))):
        part = cut_linear(whole, cut)
        assert part is not None
        assert part.values.dtype == np.int8
        np.testing.assert_array_equal(part.dequantize(), cut.of(whole.dequantize()))


def test_what_begins_or_ends_within_a_group_does_not() -> None:
    assert cut_linear(linear(8), Cut(columns=slice(0, 12))) is None
    assert cut_linear(linear(8), Cut(columns=slice(12, 24))) is None
    assert cut_linear(linear(8), Cut(rows=slice(0, 6), num_rows=8)) is None
