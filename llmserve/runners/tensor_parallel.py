"""Which part of a model each of several ranks has: tensor parallelism as in Megatron-LM.

Query heads, and key heads with them, are dealt out; so is the width inside each feed-forward, of
every expert too. A half block's first product gives each rank its own columns, its last one reads
them, and what the ranks make of it is added up once. Embedding and output layer are dealt out by
rows of the vocabulary. Norms, positions, routers and heads are whole on every rank. Source:
Megatron-LM, arXiv 1909.08053, section 3.

Where a model has fewer key heads than there are ranks, several ranks have the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..adapters import Adapter, LoraPair
from ..config import ModelConfig
from ..errors import ConfigError

__all__ = ["Cut", "Rank", "adapter_of_rank", "check_ranks", "config_of_rank", "cut_of"]

AnyArray = npt.NDArray[Any]

_BY_QUERY_HEADS = ("q_proj", "q_norm")
_BY_KEY_HEADS = ("k_proj", "v_proj", "k_norm")
_BY_INNER_WIDTH = ("gate_proj", "up_proj")
_BY_VOCABULARY = ("embed_tokens", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `count` processes that compute one model together."""

    index: int
    """0..count - 1. Rank 0 has the engine."""
    count: int

    def share(self, total: int) -> slice:
        """Its part of a number that `count` divides."""
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The part of one tensor that a rank has."""

    rows: slice = field(default_factory=partial(slice, None))
    """Outputs."""
    columns: slice = field(default_factory=partial(slice, None))
    """Inputs, of a matrix."""
    num_rows: int | None = None
    """Rows of the part, where that is more than there are: the rest is zeros."""
    is_zero: bool = False
    """Whether zeros take its place: a bias that is added once, by rank 0."""

    def of(self, values: AnyArray) -> AnyArray:
        """The part of an array [rows] or [rows, columns]: a view, or a copy where it has zeros."""
        part = values[self.rows] if values.ndim == 1 else values[self.rows, self.columns]
        if self.is_zero:
            return np.zeros_like(part)
        missing = 0 if self.num_rows is None else self.num_rows - len(part)
        if not missing:
            return part
        return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])


def check_ranks(config: ModelConfig, count: int) -> None:
    """Whether a model can be dealt out to `count` ranks.

    Raises:
        ConfigError: a size that `count` does not divide, with its name.
    """
    for name, size in _dealt_sizes(config):
        if size % count:
            raise ConfigError(
                f"this model's {name} of {size} cannot be dealt out to {count} ranks: give a "
                "tensor parallel size that divides it"
            )
    heads = config.num_kv_heads
    if heads % count and count % heads:
        raise ConfigError(
            f"this model's {heads} key heads cannot be dealt out to {count} ranks: give a "
            "tensor parallel size that divides their number, or a multiple of it"
        )


def config_of_rank(config: ModelConfig, rank: Rank) -> ModelConfig:
    """The configuration of what one rank computes.

    It has its part of the vocabulary, filled up where that does not divide, and no special ids.
    The model's sizes were checked (`check_ranks`).
    """
    experts = config.experts
    if experts is not None:
        shared = experts.shared_intermediate_size
        experts = dataclasses.replace(
            experts,
            intermediate_size=experts.intermediate_size // rank.count,
            shared_intermediate_size=None if shared is None else shared // rank.count,
        )
    has_plain = any(not config.has_experts(index) for index in range(config.num_layers))
    return dataclasses.replace(
        config,
        vocab_size=-(-config.vocab_size // rank.count),
        num_heads=config.num_heads // rank.count,
        num_kv_heads=max(1, config.num_kv_heads // rank.count),
        intermediate_size=config.intermediate_size // (rank.count if has_plain else 1),
        experts=experts,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )


def cut_of(name: str, shape: tuple[int, ...], config: ModelConfig, rank: Rank) -> Cut:
    """The part of a tensor that a rank has.

    Args:
        name: Its canonical name.
        shape: That of the whole.
        config: The whole model's, which `check_ranks` let pass.
        rank: Whose part.
    """
    *_, layer, kind = name.split(".")
    if layer in _BY_VOCABULARY:
        size = -(-config.vocab_size // rank.count)
        start = min(rank.index * size, config.vocab_size)
        return Cut(rows=slice(start, min(start + size, config.vocab_size)), num_rows=size)
    if layer in _BY_INPUTS:
        if kind == "bias":
            return Cut(is_zero=rank.index > 0)
        return Cut(columns=rank.share(shape[1]))
    if layer in ("q_norm", "k_norm") and config.qk_norm == "head":
        return Cut()
    if layer in _BY_KEY_HEADS and config.num_kv_heads < rank.count:
        head = rank.index * config.num_kv_heads // rank.count
        return Cut(rows=slice(head * config.head_dim, (head + 1) * config.head_dim))
    if layer in (*_BY_QUERY_HEADS, *_BY_KEY_HEADS, *_BY_INNER_WIDTH):
        return Cut(rows=rank.share(shape[0]))
    return Cut()


def adapter_of_rank(adapter: Adapter, config: ModelConfig, rank: Rank) -> Adapter:
    """The part of a LoRA adapter of the whole model `config` that goes with a rank's weights.

    What its ranks add to `o_proj` and `down_proj` is added up as the model's own products are.

    Raises:
        CheckpointError: it does not fit the model.
    """
    adapter.check(config)
    pairs = {}
    for place, pair in adapter.pairs.items():
        shape = (len(pair.b), pair.a.shape[1])
        cut = cut_of(f"{place.module}.weight", shape, config, rank)
        pairs[place] = LoraPair(a=pair.a[:, cut.columns], b=pair.b[cut.rows], alpha=pair.alpha)
    return Adapter(name=adapter.name, pairs=pairs, source=adapter.source)


def _dealt_sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    yield "num_heads", config.num_heads
    if any(not config.has_experts(index) for index in range(config.num_layers)):
        yield "intermediate_size", config.intermediate_size
    if config.experts is not None:
        yield "experts' intermediate_size", config.experts.intermediate_size
        if config.experts.shared_intermediate_size is not None:
            yield "shared expert's intermediate_size", config.experts.shared_intermediate_size
