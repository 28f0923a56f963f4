"""The seam between the engine and whatever guesses tokens ahead of the model.

In each step the engine asks a `Drafter` for guesses, computes them behind each sequence's last
token, and lets the target's own sampler draw at every one of those positions; guesses are kept up
to the first that differs from the draw (docs/speculation.md). So a guess changes the speed and
never a token, and a drafter may return anything, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..runners.protocol import SamplingRow
from .block_keys import BlockKeys

__all__ = ["DraftRequest", "Drafter"]


@dataclass(slots=True, kw_only=True)
class DraftRequest:
    """One decoding sequence that wants guesses. It is read during `propose` and not kept."""

    key: int
    """Unique among live sequences."""
    row: SamplingRow
    """Its tokens, parameters and random key. `token_ids` only grows while the sequence lives."""
    num_tokens: int
    """Most tokens to guess. At least 1."""
    block_tables: list[list[int]]
    """For each cache group of the target, the blocks of positions 0 to
    `len(row.token_ids) + num_tokens - 1`; empty for a drafter that reads no blocks."""
    block_keys: BlockKeys | None = None
    """Names of its full blocks; None: it shares none with other sequences."""


class Drafter(Protocol):
    """Guesses how sequences go on. Equal calls from the start give equal guesses."""

    reads_blocks: bool
    """Whether it looks at `DraftRequest.block_tables`."""

    def propose(self, requests: list[DraftRequest]) -> list[list[int]]:
        """For each request 0 to `num_tokens` ids that may follow its `token_ids`."""

    def forget(self, key: int) -> None:
        """Drop what is kept of a sequence that ended or was preempted; unknown keys are fine."""

    def check(self, keys: set[int]) -> None:
        """Raise AssertionError if anything is kept of a sequence that is not among `keys`."""
