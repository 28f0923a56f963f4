"""Paged attention against dense attention in float64, over scattered blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmserve.model.attention import Attend
from llmserve.model.scores import Scores
from llmserve.runners import torch_attention
from llmserve.runners.cache_groups import LayerGroup
from llmserve.runners.protocol import Batch, GroupTables
from llmserve.runners.torch_attention import PagedAttention
from llmserve.runners.torch_cache import PagedCache
from llmserve.runners.torch_exact import TokenAttention

BLOCK_SIZE = 4
NUM_BLOCKS = 40
TOLERANCE = 2e-6  # a few float32 roundings of sums of at most 30 values near 1


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None = None, cap: float | None = None
) -> np.ndarray:
    """Attention of the last rows of one sequence: q [T, H, D] over k, v [L, KV, D], in float64."""
    num_new, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = k.shape
    out = np.zeros(q.shape)
    for row in range(num_new):
        last = length - num_new + row + 1
        first = 0 if window is None else max(0, last - window)
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = k[first:last, kv_head].astype(np.float64) @ q[row, head] / math.sqrt(head_dim)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[row, head] = (weights / weights.sum()) @ v[first:last, kv_head]
    return out


def make_batch(tables: list[list[int]], shares: list[tuple[int, int]]) -> Batch:
    """A batch of sequences; `shares` are (first position, new tokens) of each."""
    width = max(map(len, tables))
    positions = [np.arange(first, first + count) for first, count in shares]
    slots = [
        np.array([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in places])
        for table, places in zip(tables, positions, strict=True)
    ]
    counts = [count for _, count in shares]
    return Batch(
        token_ids=np.zeros(sum(counts), dtype=np.int64),
        positions=np.concatenate(positions),
        cu_seqlens=np.array([0, *np.cumsum(counts)]),
        context_lens=np.array([first + count for first, count in shares]),
        groups=[
            GroupTables(
                slot_mapping=np.concatenate(slots),
                block_tables=np.array([table + [0] * (width - len(table)) for table in tables]),
                block_copies=np.empty((0, 2), dtype=np.int64),
            )
        ],
        logits_indices=np.zeros(0, dtype=np.int64),
        sampling=[],
    )


def make_cache(num_kv_heads: int, head_dim: int, window: int | None = None) -> PagedCache:
    return PagedCache(
        [LayerGroup(window=window, layers=(0,))],
        num_blocks=(NUM_BLOCKS,),
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


SHARES = {
    "one decode in neighbouring blocks": [(9, 1)],
    "decodes of equal length": [(7, 1), (7, 1)],
    "decodes of unequal length": [(3, 1), (11, 1), (0, 1), (25, 1)],
    "a whole prompt": [(0, 13)],
    "a later chunk": [(6, 7)],
    "decodes, a chunk and a prompt": [(5, 1), (17, 1), (8, 6), (0, 9)],
    "a long chunk": [(5, 20)],
    "whole prompts of equal length": [(0, 5), (0, 5)],
    "drafts behind each other": [(4, 3), (10, 3), (21, 3)],
    "drafts of several lengths": [(8, 1), (4, 3), (10, 2), (21, 3), (0, 2)],
    "a decode behind a chunk": [(4, 3), (10, 1)],
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 6), (4, 1, 5)]
)
@pytest.mark.parametrize("window", [None, 1, 3, 6, 16])
@pytest.mark.parametrize("mode", ["fast", "apart by length", "token by token", "capped"])
def test_attention_equals_dense_attention(
    shares: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if mode == "apart by length":
        monkeypatch.setattr(torch_attention, "_FREE_PADDING", 0)
    cap = 0.8 if mode == "capped" else None
    rng = np.random.default_rng(len(shares) + head_dim)
    cache = make_cache(num_kv_heads, head_dim, window)
    cache.keys[0][: cache.null_slots[0]] = math.nan  # what former owners of the blocks left
    cache.values[0][: cache.null_slots[0]] = math.nan
    free = list(range(NUM_BLOCKS)) if len(shares) == 1 else rng.permutation(NUM_BLOCKS).tolist()
    tables = []
    for first, count in shares:
        blocks = -(-(first + count) // BLOCK_SIZE)
        tables.append([free.pop(0) for _ in range(blocks)])
    batch = make_batch(tables, shares)
    wanted, new = [], {"q": [], "k": [], "v": []}
    for table, (first, count) in zip(tables, shares, strict=True):
        k = rng.normal(size=(first + count, num_kv_heads, head_dim)).astype(np.float32)
        v = rng.normal(size=k.shape).astype(np.float32)
        q = rng.normal(size=(count, num_heads, head_dim)).astype(np.float32)
        for place in range(first):
            if window is not None and place <= first - window:
                continue  # no query sees it: its block may belong to somebody else by now
            slot = table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
            cache.keys[0][slot] = torch.from_numpy(k[place])
            cache.values[0][slot] = torch.from_numpy(v[place])
        new["q"].append(q)
        new["k"].append(k[first:])
        new["v"].append(v[first:])
        wanted.append(dense(q, k, v, window, cap))
    q, k, v = (torch.from_numpy(np.concatenate(new[name])) for name in "qkv")
    scores, tokens = Scores(cap=cap), np.arange(batch.num_tokens)
    attends: list[Attend] = []
    if mode != "token by token":
        attends.append(PagedAttention(batch, cache, scores))
    if mode in ("token by token", "capped"):
        attends.append(TokenAttention(batch, cache, scores, tokens))
    for attend in attends:
        out = attend(0, q, k, v).numpy()
        np.testing.assert_allclose(out, np.concatenate(wanted), atol=TOLERANCE)


def test_null_slot_stays_zero() -> None:
    cache = make_cache(2, 4)
    batch = make_batch([[3], [5, 6]], [(0, 1), (4, 1)])
    attend = PagedAttention(batch, cache, Scores())
    attend(0, torch.ones(2, 4, 4), torch.ones(2, 2, 4), torch.ones(2, 2, 4))
    assert not cache.keys[0][cache.null_slots[0]].any()
    assert not cache.values[0][cache.null_slots[0]].any()
    assert int(cache.keys[0].flatten(1).any(dim=1).sum()) == 2


def test_one_long_context_is_read_apart_from_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "_FREE_PADDING", 0)
    parts = torch_attention._alike(np.array([3, 5, 6, 8, 9]), np.array([10, 900, 12, 8, 500]))
    assert [part.tolist() for part in parts] == [[5, 9], [3, 6, 8]]


def test_contexts_of_like_length_and_small_ones_are_read_together() -> None:
    for seen in ([10, 12, 8], [1000, 1100, 900], [1, 200, 3]):
        parts = torch_attention._alike(np.arange(3), np.array(seen))
        assert [part.tolist() for part in parts] == [[0, 1, 2]]
