"""What goes into the engine and what comes out of it.

A `Request` is what a client asked; the engine advances one `Sequence` for each of its `n`
choices. A request that was interrupted, by preemption or by the death of an engine, is the same
object with the output ids already made in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..runners.protocol import TokenLogprobs
from ..sampling import SamplingParams
from .grammar import Grammar

__all__ = ["FinishReason", "Pooling", "Request", "RequestOutput", "Scoring"]


class FinishReason(StrEnum):
    """How a sequence ended. Every sequence ends exactly once."""

    STOP = "stop"
    """A stop id or stop string, or the model's own end id."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""
    ABORT = "abort"
    """The client left, or asked for the end."""
    TIMEOUT = "timeout"
    """The deadline passed."""
    ERROR = "error"
    """The engine could not go on with it; `RequestOutput.error` says why."""


class Pooling(StrEnum):
    """Which final hidden states of a prompt become its vector."""

    LAST = "last"
    """That of the last token."""
    MEAN = "mean"
    """The mean over all tokens."""


class Scoring(StrEnum):
    """Which tokens of a prompt the model's head scores."""

    LAST = "last"
    """The last one: a classifier's verdict on the whole."""
    EACH = "each"
    """Every one."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt with everything needed to answer it, or to take the answer up again."""

    request_id: str
    """Unique among live requests."""
    prompt_token_ids: list[int]
    """At least one id."""
    sampling_params: SamplingParams
    """How to choose tokens and when to end."""
    seed: int
    """Key of the random numbers, 0..2**63-1, fixed at arrival: a resumed request goes on alike."""
    arrival_time: float = 0.0
    """Seconds on the engine's clock (`time.monotonic` when served)."""
    priority: int = 0
    """Lower goes first, where the policy looks at it."""
    tenant: str = ""
    """On whose account it runs, for fair scheduling."""
    cache_salt: str = ""
    """Requests share prefix-cache blocks only with those of the same salt."""
    adapter: str | None = None
    """Name of a LoRA adapter of the runner; None: the base model."""
    grammar: Grammar | None = None
    """What the text of every choice must match; None: anything."""
    pooling: Pooling | None = None
    """Return a vector of the prompt and generate nothing; None: generate."""
    scoring: Scoring | None = None
    """Return what the model's head makes of the prompt and generate nothing; None: generate."""
    block_keys: list[int] | None = None
    """Identities of the prompt's blocks in place of their tokens', for replayed traces: one for
    each block, the last of which may be partial."""
    deadline: float | None = None
    """Time on the engine's clock at which the request ends as `timeout`."""
    output_token_ids: list[list[int]] = field(default_factory=list)
    """Ids already made, one list per choice; empty for a new request."""
    ended_choices: list[int] = field(default_factory=list)
    """Choices that had ended before the request was resumed: they are not taken up again."""
    num_cached_tokens: int | None = None
    """Prefix-cache hit as first reported, kept when the request is resumed; None: not yet known."""


@dataclass(slots=True)
class RequestOutput:
    """What one step did for one choice of one request."""

    request_id: str
    choice_index: int
    """0..n-1."""
    token_ids: list[int] = field(default_factory=list)
    """New ids, in order; several when drafts were accepted or the step had several rounds, none
    when it ended without one."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry per new id where `logprobs` was asked for, else empty."""
    finish_reason: FinishReason | None = None
    """Set on the choice's last output."""
    stop_token_id: int | None = None
    """The id that ended it, when one did."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were taken from the prefix cache."""
    scheduled_time: float | None = None
    """When the choice was first scheduled, on the engine's clock; None if it never was."""
    error: str | None = None
    """For `FinishReason.ERROR`: what went wrong."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Where asked for, on the first choice's first output: one entry per prompt token but the
    first, which nothing precedes."""
    vector: list[float] | None = None
    """For a request with `pooling`: [hidden_size], on its only output."""
    scores: list[list[float]] = field(default_factory=list)
    """For a request with `scoring`: [tokens scored, labels], on its only output."""
    error_param: str | None = None
    """For `FinishReason.ERROR` where the request itself is to blame: its field at fault, or ''."""

    def singly(self) -> list[RequestOutput]:
        """The same in outputs of one token each: of the prompt with the first, the end with the
        last."""
        if len(self.token_ids) < 2:
            return [self]
        outputs = [
            RequestOutput(
                self.request_id,
                self.choice_index,
                [token_id],
                self.logprobs[place : place + 1],
                num_cached_tokens=self.num_cached_tokens,
                scheduled_time=self.scheduled_time,
            )
            for place, token_id in enumerate(self.token_ids)
        ]
        outputs[0].prompt_logprobs = self.prompt_logprobs
        last = outputs[-1]
        last.finish_reason, last.stop_token_id = self.finish_reason, self.stop_token_id
        last.error, last.error_param = self.error, self.error_param
        last.vector, last.scores = self.vector, self.scores
        return outputs
