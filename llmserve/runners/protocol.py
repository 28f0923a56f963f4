"""What the engine hands to a runner for one step, and what it gets back.

Shapes: T tokens in the step, S sequences in the step, R rows of logits asked for, G cache groups,
E hidden_size. Arrays are numpy; a runner copies what it keeps. Logits never leave the runner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..sampling import SamplingParams

__all__ = [
    "Batch",
    "CacheGroup",
    "CacheReader",
    "GroupTables",
    "HeadRows",
    "HiddenSum",
    "MaskArray",
    "PromptRows",
    "Runner",
    "RunnerInfo",
    "SamplingRow",
    "StepResult",
    "TokenLogprobs",
]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
DoubleArray = npt.NDArray[np.float64]
MaskArray = npt.NDArray[np.uint32]
"""[ceil(V / 32)] one bit for each token id: bit i % 32 of word i // 32."""


@dataclass(slots=True, kw_only=True)
class SamplingRow:
    """How one row of logits becomes a token.

    One object lives as long as its sequence; what changes from step to step follows from the
    length of `token_ids`. It describes the step under way until the step is collected.
    """

    params: SamplingParams
    seed: int
    """Key of the random numbers (docs/sampling.md: one draw is keyed by seed, choice, position)."""
    choice_index: int
    """Which of the request's `n` choices the row belongs to."""
    token_ids: list[int]
    """The sequence so far, prompt first; it only grows. A view: the runner must not change or keep
    it."""
    num_prompt_tokens: int
    """How many of `token_ids` are the prompt's."""
    end_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence; they must not be drawn before `min_tokens`."""
    allowed_mask: MaskArray | None = field(default=None, compare=False)
    """The only ids that may be drawn now, as a grammar asks; a new one before each step. None for
    its whole life: no grammar rules the row."""
    runner_state: Any = field(default=None, init=False, repr=False, compare=False)
    """The runner's own: what it derived from the fields above and keeps for the next step."""

    @property
    def position(self) -> int:
        """Absolute position of the token to be drawn, the prompt's first token being 0."""
        return len(self.token_ids)

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """End ids while `min_tokens` is not reached, else none."""
        num_generated = len(self.token_ids) - self.num_prompt_tokens
        return self.end_token_ids if num_generated < self.params.min_tokens else ()


@dataclass(slots=True, kw_only=True)
class GroupTables:
    """Where one cache group's keys and values of the step are."""

    slot_mapping: IntArray  # [T] cache slot of each token: block_id * block_size + offset
    block_tables: IntArray  # [S, most blocks of one sequence]; places out of use hold 0
    block_copies: IntArray  # [C, 2] (from, to) whole blocks, all read before the step writes


@dataclass(slots=True, kw_only=True)
class PromptRows:
    """A request for the log-probabilities that a chunk's tokens give to their successors."""

    start: int
    """Packed index of the first token whose logits are asked for."""
    targets: list[int]
    """The id that follows each of the tokens `start`, `start + 1`, ..."""
    num_top: int
    """Likeliest ids to report beside each."""


@dataclass(slots=True, kw_only=True)
class HiddenSum:
    """A request for a sum of final hidden states over packed tokens `start`..`stop - 1`.

    Added in float64, one token after the other, to `carry`: chunking does not change a bit of it.
    """

    start: int
    stop: int
    carry: DoubleArray | None  # [E]; None: zero


@dataclass(slots=True, kw_only=True)
class HeadRows:
    """A request for what the model's head makes of packed tokens `start`..`stop - 1`."""

    start: int
    stop: int


@dataclass(slots=True, kw_only=True)
class Batch:
    """One step: every sequence's new tokens packed one after another.

    Sequences with one token come first. A sequence may have several rows of logits (drafts).
    """

    token_ids: IntArray  # [T]
    positions: IntArray  # [T] absolute position of each token in its sequence
    cu_seqlens: IntArray  # [S + 1] offsets of each sequence's tokens in the packed axis
    context_lens: IntArray  # [S] tokens that the sequence's last token attends to, itself included
    groups: list[GroupTables]  # G entries, in the order of `RunnerInfo.cache_groups`
    logits_indices: IntArray  # [R] packed indices of the tokens whose logits are sampled
    sampling: list[SamplingRow]  # R entries
    fed_rows: IntArray | None = None
    """[T] for each token, the row of the step under way that draws it: it is known to the runner
    alone, which has yet to compute it, and `token_ids` means nothing. None: all are known. A row's
    place in its sequence is then that of its packed token plus 1, not `SamplingRow.position`."""
    num_rounds: int = 1
    """Tokens to draw for each sequence, one after another. Above 1 every sequence has one token,
    each has a row of logits, in the same order, and the tables have blocks for all rounds; the
    arrays describe the first. Rows then ask for nothing that hangs on tokens drawn meanwhile."""
    adapter_ids: IntArray | None = None
    """[S] 0: the base model; i: entry i - 1 of `RunnerInfo.adapters`. None: all 0."""
    prompt_rows: list[PromptRows] = field(default_factory=list)
    hidden_sums: list[HiddenSum] = field(default_factory=list)
    head_rows: list[HeadRows] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-softmax of the raw float32 logits at one position."""

    logprob: float
    """Of the chosen token."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs, best first, ties to the lowest id."""


@dataclass(slots=True, kw_only=True)
class StepResult:
    """The outcome of one batch."""

    token_ids: IntArray
    """[R] in the order of `logits_indices`; where the batch has several rounds, [N R], round by
    round: N is from 1 to `Batch.num_rounds`, fewer where the runner found a reason to stop."""
    is_finite: BoolArray | None = None
    """As long: False where a row held NaN or no finite logit, its id means nothing. None: all True.
    Only the last round may have one that is False."""
    logprobs: list[TokenLogprobs | None] | None = None
    """R entries, None for rows that did not ask; None: no row asked."""
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    """For each entry of `Batch.prompt_rows`, one per target."""
    hidden_sums: list[DoubleArray] = field(default_factory=list)
    """For each entry of `Batch.hidden_sums`, [E]."""
    head_scores: list[list[list[float]]] = field(default_factory=list)
    """For each entry of `Batch.head_rows`, [n, labels]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers whose keys and values live and die together: those with the same window."""

    num_layers: int
    window: int | None
    """Tokens that a query sees, its own included; None: all before it."""
    bytes_per_token: int
    """KV cache bytes for one token, the group's layers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What the engine and the server must know about a loaded model."""

    vocab_size: int
    """Width of the logits."""
    max_seq_len: int
    """Tokens of context."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a sequence."""
    cache_groups: tuple[CacheGroup, ...]
    """At least one."""
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
    fingerprint: str = ""
    """Digest of the model's contents: the root of every key of the prefix cache."""
    hidden_size: int = 0
    """Width of the final hidden states."""
    feeds_tokens: bool = False
    """Whether a step may be submitted while another one is under way whose tokens it goes on from
    (`Batch.fed_rows`)."""
    repeats_decodes: bool = False
    """Whether it takes batches of several rounds."""
    shares_blocks: bool = True
    """Whether sequences may hold the same block; False: no prefix cache, each computes its own."""
    adapters: tuple[str, ...] = ()
    """Names of the LoRA adapters loaded beside the model."""
    head: str | None = None
    """`Head.kind` of a model that gives scores or vectors and no text; None: it gives text."""
    labels: tuple[str, ...] = ()
    """Names of the head's scores."""

    @property
    def cache_bytes_per_token(self) -> int:
        """KV cache bytes for one token while every layer keeps it."""
        return sum(group.bytes_per_token for group in self.cache_groups)


class Runner(Protocol):
    """A loaded model that executes steps. One thread uses it at a time."""

    info: RunnerInfo
    overlaps: bool
    """Whether `submit` returns before the step is computed."""

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the KV cache: for each cache group that many blocks. Called first; again: anew."""

    def submit(self, batch: Batch) -> None:
        """Begin one step. At most one is under way, two where the second goes on from the first.

        After an exception, here or in `collect`, none is.
        """

    def collect(self) -> StepResult:
        """Wait for the step that has been under way the longest and return its outcome."""

    def close(self) -> None:
        """Free what the runner holds."""


@runtime_checkable
class CacheReader(Protocol):
    """A runner whose cache can be read and written from outside, between two steps."""

    def cache_blocks(self) -> list[list[npt.NDArray[np.uint8]]]:
        """For each cache group, for each of its layers: the blocks, [num_blocks, bytes], not a
        copy. Valid until the cache is allocated anew."""
