"""Parts of a model's shape that only some models have: stretched positions, experts, heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config_checks import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_WIDTH,
    check_choice,
    check_count,
    check_flag,
    check_positive,
)
from .errors import ConfigError

__all__ = ["Experts", "Head", "RopeScaling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A stretch of the rotary frequencies for contexts longer than the training's."""

    kind: Literal["linear", "llama3"]
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones (Llama 3.1)."""
    factor: float
    """How much longer the context became."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_seq_len / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths under original_max_seq_len / this are kept."""
    original_max_seq_len: int = 8192
    """llama3: the context of the training."""

    def __post_init__(self) -> None:
        check_choice("rope_scaling.kind", self.kind, ("linear", "llama3"))
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rope_scaling.{name}", getattr(self, name))
        check_count("rope_scaling.original_max_seq_len", self.original_max_seq_len, MAX_CONTEXT)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must be above "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Several feed-forwards in a layer, of which each token goes through a few.

    A router gives every expert a probability: the softmax over all of them, in float32. The
    likeliest are taken, of equals those of the lowest index, and their outputs are added with
    these weights (Mixtral, arXiv 2401.04088, section 2.1).
    """

    num_experts: int
    """Experts of each layer that has them."""
    num_experts_per_token: int
    """How many a token goes through."""
    intermediate_size: int
    """Width inside one expert."""
    shared_intermediate_size: int | None = None
    """Width of one more expert for every token, with a gate of its own; None: there is none."""
    normalize_weights: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    dense_layers: tuple[int, ...] = ()
    """Layers with one plain feed-forward instead, ascending."""

    def __post_init__(self) -> None:
        check_count("experts.num_experts", self.num_experts, MAX_EXPERTS)
        check_count("experts.num_experts_per_token", self.num_experts_per_token, self.num_experts)
        check_count("experts.intermediate_size", self.intermediate_size, 4 * MAX_WIDTH)
        shared = self.shared_intermediate_size
        if shared is not None:
            check_count("experts.shared_intermediate_size", shared, 4 * MAX_WIDTH)
        check_flag("experts.normalize_weights", self.normalize_weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the last hidden states are turned into, instead of logits over the vocabulary."""

    kind: Literal["sequence", "token", "span", "embedding"]
    """Scores of a whole text, at its last token (a classifier; with one label, a reward); scores of
    each token; of each token as an answer's start and end; or the hidden states themselves."""
    labels: tuple[str, ...] = ()
    """Names of the scores, in their order; none for `embedding`."""

    def __post_init__(self) -> None:
        check_choice("head.kind", self.kind, ("sequence", "token", "span", "embedding"))
        if any(not isinstance(label, str) for label in self.labels):
            raise ConfigError(f"head.labels must be names, got {list(self.labels)}")
        if self.kind == "embedding":
            if self.labels:
                raise ConfigError("head.labels: an embedding has none")
            return
        check_count("head.labels: their number", len(self.labels), MAX_WIDTH)
        if self.kind == "span" and self.labels != ("start", "end"):
            raise ConfigError(f"head.labels of a span are start, end, not {list(self.labels)}")
