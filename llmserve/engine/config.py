"""Sizes and rules of one engine, and how many KV blocks a memory budget buys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError

__all__ = ["EngineConfig", "PolicyName", "SpeculationConfig", "StepCost"]

PolicyName = Literal["fcfs", "priority", "fair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What a step takes, as measured at load: `base_s + token_s * tokens`."""

    base_s: float
    """Seconds of a step whatever its size. Above 0."""
    token_s: float
    """Seconds more for each token. Above 0."""

    def seconds(self, num_tokens: float) -> float:
        """Time of a step of `num_tokens`."""
        return self.base_s + self.token_s * num_tokens

    def __post_init__(self) -> None:
        if not (self.base_s > 0 and self.token_s > 0):
            raise ConfigError("a step's cost must be above 0 seconds, for itself and per token")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """How tokens are guessed ahead of the model. Guesses change the speed, never the tokens."""

    method: Literal["ngram", "draft"]
    """`ngram`: what followed the same words earlier in the sequence; `draft`: a smaller model."""
    num_draft_tokens: int = 4
    """Most tokens guessed for one sequence in one step. 1..15, less than a block."""
    min_ngram: int = 2
    """Shortest run of tokens that must occur again. At least 1."""
    max_ngram: int = 4
    """Longest run of tokens looked for."""
    is_always_on: bool = False
    """Guess even while it does not pay."""

    def __post_init__(self) -> None:
        if self.method not in ("ngram", "draft"):
            raise ConfigError(f"speculation is by ngram or draft, got {self.method!r}")
        if not 1 <= self.num_draft_tokens <= 15:
            raise ConfigError(f"num_draft_tokens must be 1 to 15, got {self.num_draft_tokens}")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(
                f"min_ngram ({self.min_ngram}) must be from 1 to max_ngram ({self.max_ngram})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits, sizes and rules of one engine, fixed for its life."""

    num_blocks: tuple[int, ...]
    """KV blocks in the pool of each cache group."""
    block_size: int = 16
    """Tokens in one KV block."""
    max_seq_len: int
    """Most tokens of one sequence, prompt and answer together; each pool holds at least one."""
    max_batched_tokens: int = 512
    """Most tokens in one step, decodes and prefill chunks together. Every decode goes on all the
    same, and prefill always gets a block's tokens, and one for each sequence that runs or waits, up
    to `max_num_seqs`: a step may have twice that many."""
    max_prefill_tokens: int = 0
    """Most tokens in a step in which nobody decodes, so that nobody waits for a next token; where
    this is less than `max_batched_tokens`, that counts."""
    far_token_weight: float = 1.0
    """What a token of the last chunk of `max_seq_len` takes of that number, as it attends to most;
    a token of a prompt's first chunk takes 1, those of others by their chunk's start. 1 or more."""
    max_num_seqs: int = 64
    """Most sequences running at once."""
    has_prefix_cache: bool = True
    """Whether blocks are shared between requests with equal beginnings."""
    policy: PolicyName = "fcfs"
    """Who is served first: by arrival; by `Request.priority`; by tenants' shares."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Policy `fair`: shares of tenants; one that is not named weighs 1."""
    most_rounds_s: float = 0.0
    """Seconds that a step of several rounds of decoding may take, by what the last one took; 0:
    every step is one round."""
    speculation: SpeculationConfig | None = None
    """How tokens are guessed ahead; None: not at all."""
    step_cost: StepCost | None = None
    """As measured at load; None: not measured."""
    draft_cost: StepCost | None = None
    """The same of the draft model."""
    full_step_s: float | None = None
    """Measured time of a full step, where `max_batched_tokens` was chosen by it."""

    @property
    def most_tokens(self) -> int:
        """Of any step, but for what `max_num_seqs` adds."""
        return max(self.max_batched_tokens, self.max_prefill_tokens)

    def __post_init__(self) -> None:
        for name in ("block_size", "max_seq_len", "max_batched_tokens", "max_num_seqs"):
            _check_count(name, getattr(self, name))
        if self.max_prefill_tokens:
            _check_count("max_prefill_tokens", self.max_prefill_tokens)
        if not 1.0 <= self.far_token_weight < float("inf"):
            raise ConfigError(f"far_token_weight must be 1 or more, got {self.far_token_weight!r}")
        if not 0.0 <= self.most_rounds_s < float("inf"):
            raise ConfigError(f"most_rounds_s must be 0 or more, got {self.most_rounds_s!r}")
        if not self.num_blocks:
            raise ConfigError("num_blocks needs a number for each cache group")
        for count in self.num_blocks:
            _check_count("num_blocks", count)
        if self.policy not in ("fcfs", "priority", "fair"):
            raise ConfigError(f"policy must be fcfs, priority or fair, got {self.policy!r}")
        if any(not weight > 0 for weight in self.tenant_weights.values()):
            raise ConfigError("a tenant's weight must be above 0")
        speculation = self.speculation
        if speculation is not None and speculation.num_draft_tokens >= self.block_size:
            raise ConfigError(
                f"num_draft_tokens ({speculation.num_draft_tokens}) must be under the block size "
                f"({self.block_size})"
            )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
