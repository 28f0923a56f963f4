"""Pools, block copies and the places that are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.runners.cache_groups import LayerGroup
from llmserve.runners.torch_cache import PagedCache
from llmserve.runners.torch_cache_form import CACHE_FORMS

GROUPS = [LayerGroup(window=None, layers=(1,)), LayerGroup(window=5, layers=(0, 2))]


def make_cache(form: str | None = None) -> PagedCache:
    return PagedCache(
        GROUPS,
        num_blocks=(6, 4),
        block_size=4,
        num_kv_heads=1,
        head_dim=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        form=None if form is None else CACHE_FORMS[form],
    )


def test_each_layer_lies_in_the_pool_of_its_group() -> None:
    cache = make_cache()
    assert [len(keys) for keys in cache.keys] == [18, 26, 18]
    assert [len(values) for values in cache.values] == [18, 26, 18]
    assert cache.spare_slots == [24, 16]
    assert cache.null_slots == [25, 17]


def test_copies_read_everything_before_they_write() -> None:
    cache = make_cache()
    for pool in (*cache.keys, *cache.values):
        pool.copy_(torch.arange(pool.numel()).view(pool.shape))
    before = [pool.clone() for pool in (*cache.keys, *cache.values)]
    cache.copy_blocks(1, np.array([[0, 1], [1, 2], [2, 0]]))  # a ring
    after = [*cache.keys, *cache.values]
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        is_copied = index % 3 != 1
        wanted = old.clone()
        if is_copied:
            wanted[4:8], wanted[8:12], wanted[0:4] = old[0:4], old[4:8], old[8:12]
        assert torch.equal(new, wanted)


def test_places_start_at_a_block_and_never_leave_what_is_asked_for() -> None:
    cache = make_cache()
    tables = np.array([[2, 5, 0], [0, 3, 1]])
    slots, is_outside = cache.places(0, tables, np.array([0, 6]), np.array([5, 11]), 8)
    null = cache.null_slots[0]
    assert slots.tolist() == [
        [8, 9, 10, 11, 20, null, null, null],
        [null, null, 14, 15, 4, 5, 6, null],
    ]
    assert np.array_equal(is_outside, slots == null)


def test_places_wider_than_the_block_table_lead_to_the_null_slot() -> None:
    cache = make_cache()
    slots, _ = cache.places(0, np.array([[1]]), np.array([0]), np.array([3]), 10)
    assert slots.tolist() == [[4, 5, 6] + [cache.null_slots[0]] * 7]


@pytest.mark.parametrize("form", [None, *CACHE_FORMS])
def test_what_is_written_is_read_and_copied_in_the_caches_form(form: str | None) -> None:
    cache = make_cache(form)
    k, v = torch.tensor([[[3.0, -4.0]], [[1e-3, 0.0]]]), torch.tensor([[[7.0, 7.0]], [[0.5, 2.0]]])
    slots = torch.tensor([5, 6])
    cache.write(2, slots, k, v)
    cache.copy_blocks(1, np.array([[1, 3]]))  # slots 4..7 to 12..15
    for read in (slots, slots + 8):
        found = cache.read(2, read)
        # Three bits of mantissa, or one of 127 steps.
        torch.testing.assert_close(found, (k, v), rtol=0.0 if form is None else 0.06, atol=0)
    null = torch.tensor([cache.null_slots[1]])
    assert not torch.cat(cache.read(2, null)).any()
    assert not torch.cat(cache.read(0, slots)).any(), "another layer's"
