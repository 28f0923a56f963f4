"""The token state that the engine advances: one for each choice of a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runners.protocol import DoubleArray, SamplingRow, TokenLogprobs
from .admission import draws
from .block_keys import BlockKeys
from .grammar import Constraint
from .request import FinishReason, Request

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One choice of one request: its tokens, and what is known of it besides the cache.

    What changes every step while it runs stands in `RunningTable`, in its row. A preempted
    sequence and one resubmitted to a new engine are the same thing: tokens without a row.
    """

    request: Request
    choice_index: int
    uid: int
    """Number in order of creation: no two of one engine have the same, ties of arrival go to the
    lower one."""
    token_ids: list[int]
    """Prompt, then output. Only the engine appends."""
    max_len: int
    """Length at which the sequence ends as `length`."""
    stop_token_ids: frozenset[int]
    """Ids that end it; they count as generated."""
    block_keys: BlockKeys
    """Names of its full blocks."""
    shares_blocks: bool = True
    """Whether its blocks are offered to others, be it only to the request's other choices."""
    row: int = -1
    """Its row in the table of running sequences; -1: it waits."""
    num_sealed_blocks: int = 0
    """Full blocks that need no more sealing."""
    num_cached_tokens: int | None = None
    """Tokens of the first prefix-cache hit; None: never admitted."""
    scheduled_time: float | None = None
    """When its first token was scheduled, on the engine's clock."""
    constraint: Constraint | None = None
    """What says which token may come next; None: any may."""
    finish_reason: FinishReason | None = None
    owes_prompt_logprobs: bool = False
    """Whether log-probabilities of the prompt are asked for and not given out yet."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Collected so far, where asked for: entry i is of prompt token i + 1."""
    hidden_sum: DoubleArray | None = None
    """Where a vector is asked for: sum of the final hidden states so far, [E]."""
    head_scores: list[list[float]] = field(default_factory=list)
    """Where a head's scores are asked for: those so far."""
    is_foreseeable: bool = field(init=False)
    """Whether a token can be drawn before the host knows the one before it: no grammar and no
    penalty looks at it."""
    is_repeatable: bool = field(init=False)
    """Whether several can be drawn in one step: nothing about it changes on the way, and nothing
    but ids is told."""
    request_id: str = field(init=False)
    sampling: SamplingRow = field(init=False)
    """How its next token is to be drawn; lives as long as the sequence."""

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        params = self.request.sampling_params
        self.is_foreseeable = self.constraint is None and not params.has_penalties
        self.is_repeatable = (
            self.is_foreseeable and params.logprobs is None and not params.min_tokens
        )
        self.sampling = SamplingRow(
            params=params,
            seed=self.request.seed,
            choice_index=self.choice_index,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            end_token_ids=tuple(sorted(self.stop_token_ids)),
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def draws(self) -> bool:
        """Whether tokens are generated at all."""
        return draws(self.request)

    @property
    def takes_hits(self) -> bool:
        """Whether blocks may come from the prefix cache: not where every token must be computed."""
        request = self.request
        is_whole = (
            request.pooling is not None or request.scoring is not None or self.owes_prompt_logprobs
        )
        return self.shares_blocks and not is_whole

    def end_after(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends now that `token_id` was appended, if it does."""
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None
