"""What one step computes: the scheduler's choice, from which batch and outcome are made."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..runners.protocol import IntArray
from .sequence import Sequence

__all__ = ["Chunk", "Step", "StepWork"]


@dataclass(slots=True, eq=False)
class Chunk:
    """Tokens `start`..`stop - 1` of one sequence: a piece of prefill, or a token with drafts."""

    sequence: Sequence
    start: int
    """Tokens of the sequence that were computed before."""
    stop: int
    """Known tokens that are computed after it; drafts come on top."""
    draft_ids: list[int] = field(default_factory=list)
    """Guesses for the tokens from `stop` on."""
    has_prompt_rows: bool = False
    """Whether the batch asks for log-probabilities of prompt tokens in it."""
    has_hidden_sum: bool = False
    """Whether the batch asks for its hidden states."""
    has_head_rows: bool = False
    """Whether the batch asks for the head's scores of it."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, drafts included."""
        return self.stop - self.start + len(self.draft_ids)

    @property
    def is_last(self) -> bool:
        """Whether it reaches the end of what is known, so that a token can be drawn."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def num_draws(self) -> int:
        """Rows of logits that are sampled."""
        return 1 + len(self.draft_ids) if self.is_last and self.sequence.draws else 0


@dataclass(slots=True, eq=False)
class Step:
    """The sequences of one step: decodes, which are all alike, and everything else."""

    decodes: list[Sequence] = field(default_factory=list)
    """One token to compute and one to draw, each."""
    decode_rows: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Their rows in the running table, ..."""
    decode_lengths: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """... and their tokens that are in the cache after it."""
    chunks: list[Chunk] = field(default_factory=list)
    """Those of one token first."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that had to give up their blocks for it."""
    num_rounds: int = 1
    """Tokens that each decode may draw, one after another; above 1 there are no chunks."""
    fed_rows: IntArray | None = None
    """Where the step was chosen before the result of the last one was known, and has nothing but
    decodes: the place of each among those of the last step."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decodes and not self.chunks

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        num_decoded = len(self.decodes) * self.num_rounds
        return num_decoded + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        """All that take part, in the order of the batch."""
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step computed, for whoever wants to know where time went."""

    num_sequences: int
    num_tokens: int
    chunks: list[tuple[str, int, int, int]]
    """Prompt tokens computed: request id, choice, first and last token + 1."""
    preempted: list[tuple[str, int]]
    """Request id and choice of sequences that gave up their blocks."""

    @classmethod
    def of(cls, step: Step) -> StepWork:
        """The work of a step, which may be empty."""
        return cls(
            num_sequences=len(step.decodes) + len(step.chunks),
            num_tokens=step.num_tokens,
            chunks=[
                (chunk.sequence.request_id, chunk.sequence.choice_index, chunk.start, chunk.stop)
                for chunk in step.chunks
                if not chunk.draft_ids
            ],
            preempted=[(one.request_id, one.choice_index) for one in step.preempted],
        )
