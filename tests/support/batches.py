"""Steps made by hand, for tests of runners without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmserve.runners.protocol import (
    Batch,
    GroupTables,
    HiddenSum,
    IntArray,
    PromptRows,
    SamplingRow,
)
from llmserve.sampling import SamplingParams


@dataclass(slots=True, kw_only=True)
class Share:
    """What one sequence contributes to a step."""

    token_ids: list[int]
    """Its new tokens."""
    first: int = 0
    """Position of the first of them."""
    tables: list[list[int]]
    """Its block table in each cache group."""
    rows: Sequence[SamplingRow] = ()
    """How the tokens after its last new ones are drawn."""
    adapter_id: int = 0

    @property
    def stop(self) -> int:
        """Position after its last new token."""
        return self.first + len(self.token_ids)


def make_row(token_ids: list[int], **changes: object) -> SamplingRow:
    """A greedy row after `token_ids`; `changes` are fields of `SamplingParams`."""
    params = SamplingParams(**{"temperature": 0.0, **changes})  # type: ignore[arg-type]
    return SamplingRow(
        params=params, seed=1, choice_index=0, token_ids=token_ids, num_prompt_tokens=len(token_ids)
    )


def make_batch(
    shares: list[Share],
    *,
    block_size: int,
    copies: list[list[tuple[int, int]]] | None = None,
    prompt_rows: Sequence[PromptRows] = (),
    hidden_sums: Sequence[HiddenSum] = (),
) -> Batch:
    """Pack `shares` in their order; `copies` are block copies, for each group."""
    lengths = [len(share.token_ids) for share in shares]
    cu_seqlens = np.cumsum([0, *lengths])
    adapter_ids = np.array([share.adapter_id for share in shares])
    num_groups = len(shares[0].tables)
    return Batch(
        token_ids=np.concatenate([_array(share.token_ids) for share in shares]),
        positions=np.concatenate([np.arange(share.first, share.stop) for share in shares]),
        cu_seqlens=cu_seqlens,
        context_lens=_array([share.stop for share in shares]),
        groups=[
            _tables(shares, group, block_size, copies[group] if copies else [])
            for group in range(num_groups)
        ],
        logits_indices=_array(
            [
                int(end) - len(share.rows) + place
                for share, end in zip(shares, cu_seqlens[1:], strict=True)
                for place in range(len(share.rows))
            ]
        ),
        sampling=[row for share in shares for row in share.rows],
        adapter_ids=adapter_ids if adapter_ids.any() else None,
        prompt_rows=list(prompt_rows),
        hidden_sums=list(hidden_sums),
    )


def _tables(
    shares: list[Share], group: int, block_size: int, copies: list[tuple[int, int]]
) -> GroupTables:
    width = max(len(share.tables[group]) for share in shares)
    slots = [
        share.tables[group][position // block_size] * block_size + position % block_size
        for share in shares
        for position in range(share.first, share.stop)
    ]
    padded = [share.tables[group] + [0] * (width - len(share.tables[group])) for share in shares]
    return GroupTables(
        slot_mapping=_array(slots),
        block_tables=_array(padded),
        block_copies=np.array(copies, dtype=np.int64).reshape(-1, 2),
    )


def _array(values: Sequence[object]) -> IntArray:
    return np.array(values, dtype=np.int64)
