"""Attention within documents by torch's packed kernel, played in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from llmserve.training.attention import PackedAttention, make_attention
from llmserve.training.attention_varlen import VarlenAttention
from support.training_runs import tiny_config

# Row 0: documents of 5 and 3 tokens; row 1: one of 6, then two places out of use.
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])
CPU, AWAY = torch.device("cpu"), torch.device("meta")


def played(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What the kernel's documentation says, document by document."""
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert (query.shape[1] != key.shape[1]) == enable_gqa
    out = torch.full_like(query, float("nan"))
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert end - start <= min(max_q, max_k)
        places = torch.arange(end - start)
        back = places[:, None] - places[None, :]
        seen = back >= -window_size[1]
        if window_size[0] >= 0:
            seen &= back <= window_size[0]
        repeats = query.shape[1] // key.shape[1]
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 2}, {"sliding_window": 3}, {"attention_scale": 0.3}], ids=str
)
def test_it_is_attention_with_a_mask_of_documents(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", played)
    config = tiny_config(**changes)
    torch.manual_seed(0)
    q = torch.randn(2, 8, config.num_heads, config.head_dim)
    k, v = (torch.randn(2, 8, config.num_kv_heads, config.head_dim) for _ in range(2))
    ours = VarlenAttention(config, POSITIONS, CPU)(0, q, k, v)
    theirs = PackedAttention(config, POSITIONS)(0, q, k, v)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_batches_of_like_numbers_of_documents_have_one_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = set()
    monkeypatch.setattr(
        varlen,
        "varlen_attn",
        lambda q, k, v, starts, *rest, **options: shapes.add(starts.shape) or q,
    )
    q = torch.zeros(1, 128, 2, 8)
    for length in (128, 64, 20, 2, 1):
        positions = (torch.arange(128) % length)[None]
        VarlenAttention(tiny_config(), positions, CPU)(0, q, q, q)
    assert shapes == {(65,), (129,)}


def test_it_is_taken_away_from_the_host_in_two_bytes_alone() -> None:
    def kind(device: torch.device, *, is_mixed: bool, **changes: Any) -> str:
        config = tiny_config(**changes)
        found = make_attention(config, POSITIONS, is_mixed=is_mixed, device=device)
        return type(found).__name__

    assert kind(AWAY, is_mixed=True) == "VarlenAttention"
    assert kind(AWAY, is_mixed=False) == "PackedAttention"
    assert kind(AWAY, is_mixed=True, head_dim=12) == "PackedAttention"
    assert kind(AWAY, is_mixed=True, attention_softcap=20.0) == "PackedAttention"
    assert kind(CPU, is_mixed=True) == "MatrixAttention"
