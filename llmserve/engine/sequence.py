"""The token state that the engine advances: one for each choice of a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runners.protocol import SamplingRow
from .request import FinishReason, Request

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One choice of one request: its tokens, and how many of them are in the KV cache.

    A preempted sequence and one resubmitted to a new engine are the same thing: tokens without
    cache entries, `num_computed_tokens` 0.
    """

    request: Request
    choice_index: int
    order: int
    """Admission number: ties of priority and arrival go to the lower one."""
    token_ids: list[int]
    """Prompt, then output. Only the engine appends."""
    max_len: int
    """Length at which the sequence ends as `length`."""
    stop_token_ids: frozenset[int]
    """Ids that end it; they count as generated."""
    block_table: list[int] = field(default_factory=list)
    """Physical blocks, in order of position."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    scheduled_time: float | None = None
    """When its first token was scheduled, on the engine's clock."""
    finish_reason: FinishReason | None = None

    @property
    def sort_key(self) -> tuple[int, float, int]:
        """Order of service: priority, then arrival. The largest key is preempted first."""
        return (self.request.priority, self.request.arrival_time, self.order)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens not yet in the cache: 1 while decoding, more during prefill."""
        return len(self.token_ids) - self.num_computed_tokens

    def sampling_row(self) -> SamplingRow:
        """How the token after the last one is to be drawn."""
        params = self.request.sampling_params
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        is_early = num_output_tokens < params.min_tokens
        return SamplingRow(
            params=params,
            seed=self.request.seed,
            choice_index=self.choice_index,
            position=len(self.token_ids),
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            banned_token_ids=tuple(self.stop_token_ids) if is_early else (),
        )

    def end_after(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends now that `token_id` was appended, if it does."""
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None
