"""What the engine hands to a runner for one step, and what it gets back.

Shapes: T tokens in the step, S sequences in the step, R rows of logits asked for (R <= T).
Arrays are numpy; a runner copies what it keeps. Logits never leave the runner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..sampling import SamplingParams

__all__ = [
    "Batch",
    "Runner",
    "RunnerInfo",
    "SampledToken",
    "SamplingRow",
    "StepResult",
    "TokenLogprobs",
]

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class SamplingRow:
    """How one row of logits becomes a token."""

    params: SamplingParams
    seed: int
    """Key of the random numbers (architecture: one draw is keyed by seed, choice, position)."""
    choice_index: int
    """Which of the request's `n` choices the row belongs to."""
    position: int
    """Absolute position of the token to be drawn, the prompt's first token being 0."""
    token_ids: list[int]
    """The sequence so far, prompt first. A view: the runner must not change or keep it."""
    num_prompt_tokens: int
    """How many of `token_ids` are the prompt's."""
    banned_token_ids: tuple[int, ...] = ()
    """Ids that must not be drawn now (end ids before `min_tokens`)."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """One step: every sequence's new tokens packed one after another."""

    token_ids: IntArray  # [T]
    positions: IntArray  # [T] absolute position of each token in its sequence
    slot_mapping: IntArray  # [T] cache slot of each token: block_id * block_size + offset
    cu_seqlens: IntArray  # [S + 1] offsets of each sequence's tokens in the packed axis
    context_lens: IntArray  # [S] tokens that the sequence's last token attends to, itself included
    block_tables: IntArray  # [S, most blocks of one sequence] padded with 0
    logits_indices: IntArray  # [R] packed indices of the tokens whose logits are sampled
    sampling: list[SamplingRow]  # R entries

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return len(self.token_ids)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return len(self.token_ids) == 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-softmax of the raw float32 logits at one position."""

    logprob: float
    """Of the chosen token."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs, best first, ties to the lowest id."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The outcome of one row of logits."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    is_finite: bool = True
    """False when the row held NaN or no finite logit at all: `token_id` means nothing then."""


@dataclass(slots=True)
class StepResult:
    """The outcome of one batch: one entry per row of `logits_indices`, in its order."""

    tokens: list[SampledToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What the engine and the server must know about a loaded model."""

    vocab_size: int
    """Width of the logits."""
    max_seq_len: int
    """Tokens of context."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a sequence."""
    cache_bytes_per_token: int
    """KV cache bytes for one token, all layers together."""
    runner: str
    """Name of the runner."""
    executed_form: str
    """What the arithmetic really does, for example `int4 weights as float32`."""
    cache_dtype: str
    """Type of the KV cache."""
    num_parameters: int
    """Parameters of the model, shared ones once."""
    weight_bytes: int
    """Bytes of the weights as executed."""


class Runner(Protocol):
    """A loaded model that executes steps. One thread uses it at a time."""

    info: RunnerInfo
    overlaps: bool
    """Whether `submit` returns before the step is computed."""

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the KV cache: `num_blocks` blocks of `block_size` tokens. Called once, first."""

    def submit(self, batch: Batch) -> None:
        """Begin one step. At most one is under way."""

    def collect(self) -> StepResult:
        """Wait for the step under way and return its outcome."""

    def close(self) -> None:
        """Free what the runner holds."""
