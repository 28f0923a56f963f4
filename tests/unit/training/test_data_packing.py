"""Packed windows: every token once, no document cut that fits, each as if it stood alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from llmserve.errors import DataError
from llmserve.model.transformer import Transformer
from llmserve.training.attention import make_attention
from llmserve.training.batches import IGNORED
from llmserve.training.data_packing import PackedWindows, pack_documents
from support.training_runs import tiny_config

END = 7
CPU = torch.device("cpu")
sizes_lists = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def starts_of(sizes: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


def make_windows(
    sizes: list[int], *, context: int = 16, seed: int | None = 0, end_id: int | None = END
) -> tuple[PackedWindows, np.ndarray[Any, np.dtype[np.uint16]]]:
    """Windows of documents whose ids count from 10, so that each token is known by its id."""
    ids = np.arange(10, 10 + sum(sizes)).astype(np.uint16)
    return PackedWindows(ids, starts_of(sizes), context=context, seed=seed, end_id=end_id), ids


@settings(max_examples=80, deadline=None)
@given(sizes_lists, st.integers(2, 24))
def test_every_token_has_one_place_and_its_own_target(sizes: list[int], context: int) -> None:
    windows, ids = make_windows(sizes, context=context)
    inputs, targets, positions = windows.read(0, windows.windows_per_epoch)
    is_used = (inputs > 0).numpy()
    assert sorted(inputs[is_used].tolist()) == ids.tolist()
    last = {int(ids[end - 1]) for end in np.cumsum(sizes)}
    found = dict(zip(inputs[is_used].tolist(), targets[is_used].tolist(), strict=True))
    assert found == {token: END if token in last else token + 1 for token in ids.tolist()}
    assert (targets[~is_used] == IGNORED).all()
    assert (positions[~is_used] == 0).all()
    assert windows.num_targets(0, windows.windows_per_epoch) == int((targets != IGNORED).sum())
    offsets = dict(zip(ids.tolist(), np.arange(sum(sizes)), strict=True))
    first = np.repeat(starts_of(sizes), sizes)
    for token, position in zip(inputs[is_used].tolist(), positions[is_used].tolist(), strict=True):
        place = offsets[token]
        assert position == (place - first[place]) % context


@settings(max_examples=80, deadline=None)
@given(sizes_lists, st.integers(2, 24))
def test_no_document_is_cut_that_fits_and_little_is_wasted(sizes: list[int], context: int) -> None:
    packing = pack_documents(starts_of(sizes), sum(sizes), context=context)
    pieces = set(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    for start, size in zip(starts_of(sizes).tolist(), sizes, strict=True):
        if size <= context:
            assert (start, size) in pieces
    fill = packing.window_tokens
    assert fill.max() <= context
    assert packing.wasted_share == pytest.approx(1 - sum(sizes) / (len(fill) * context))
    # Two windows that would fit into one are never left.
    assert len(fill) < 2 or sum(sorted(fill.tolist())[:2]) > context


def test_waste_of_short_documents_is_small() -> None:
    sizes = np.random.default_rng(0).integers(1, 400, 3000).tolist()
    packing = pack_documents(starts_of(sizes), sum(sizes), context=256)
    assert packing.wasted_share < 0.002


def test_order_is_a_function_of_seed_and_position() -> None:
    sizes = list(range(1, 40))
    whole, _ = make_windows(sizes)
    count = whole.windows_per_epoch
    expected = whole.read(0, 3 * count)[0]
    for position in (0, 1, count - 1, count, 2 * count + 1):
        later, _ = make_windows(sizes)
        assert torch.equal(later.read(position, 3 * count - position)[0], expected[position:])
    assert not torch.equal(expected[:count], expected[count : 2 * count])
    assert not torch.equal(make_windows(sizes, seed=1)[0].read(0, count)[0], expected[:count])
    unshuffled, _ = make_windows(sizes, seed=None)
    rows = {tuple(row) for row in unshuffled.read(0, count)[0].tolist()}
    assert rows == {tuple(row) for row in expected[:count].tolist()}


def test_last_token_has_no_target_without_an_end_token() -> None:
    windows, _ = make_windows([3, 5, 20], end_id=None)
    assert windows.num_targets(0, windows.windows_per_epoch) == 28 - 3


def test_no_document_is_refused() -> None:
    with pytest.raises(DataError, match="no document"):
        PackedWindows(np.empty(0), starts_of([])[:0], context=4, seed=0, end_id=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh"},
    "sinusoidal": {"positions": "sinusoidal"},
    "none": {"positions": "none"},
    "sliding": {"sliding_window": 4},
    "softcap": {"attention_softcap": 20.0},
    "multi-head": {"num_kv_heads": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_packed_document_is_computed_as_if_it_stood_alone(name: str, is_mixed: bool) -> None:
    """`is_mixed` picks the form of the attention; the numbers are float32 in both."""
    if is_mixed and name == "softcap":
        pytest.skip("refused by name")
    config = tiny_config(**VARIANTS[name])
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(1))
    sizes = [5, 16, 3, 40, 1, 9, 2, 11]
    windows, ids = make_windows(sizes)
    inputs, targets, positions = windows.read(0, windows.windows_per_epoch)
    attend = make_attention(config, positions, is_mixed=is_mixed, device=CPU)
    packed = model(inputs, attend, positions)
    total = functional.cross_entropy(packed.flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(total, list(model.parameters()))
    alone_total = torch.zeros(())
    for start, size in zip(starts_of(sizes).tolist(), sizes, strict=True):
        document = torch.tensor(ids[start : start + size].astype(np.int64))
        following = torch.cat([document[1:], torch.tensor([END])])
        for piece, after in zip(document.split(16), following.split(16), strict=True):
            alone = model(piece[None])[0]
            row, column = (inputs == piece[0]).nonzero()[0].tolist()
            here = packed[row, column : column + len(piece)]
            torch.testing.assert_close(here, alone, atol=1e-5, rtol=1e-5)
            alone_total = alone_total + functional.cross_entropy(alone, after, reduction="sum")
    torch.testing.assert_close(total, alone_total, atol=1e-3, rtol=1e-5)
    expected = torch.autograd.grad(alone_total, list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_the_mask_documents_would_see_each_other() -> None:
    """The test above can fail: plain causal attention over the same rows gives other numbers."""
    config = tiny_config()
    model = Transformer(dataclasses.replace(config))
    model.initialize(torch.Generator().manual_seed(1))
    windows, _ = make_windows([5, 9])
    inputs, _, positions = windows.read(0, 1)
    kept = model(inputs, make_attention(config, positions, is_mixed=False, device=CPU), positions)
    mixed = model(inputs, make_attention(config, None, is_mixed=False, device=CPU), positions)
    assert (kept - mixed).abs().max() > 1e-3
