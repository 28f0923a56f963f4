"""How a step goes through the model: whole, or in tiles that make its bits its own.

A product's rounding depends on how many rows it has, an elementwise operation's on where its
vectors end. `WholeForward` takes that for the speed: one pass over all tokens. `TiledForward`
(deterministic mode, decision 6) computes tiles of one fixed number of rows, so that every
operation has the same shape for ever, and attention token by token (`torch_exact.py`).

Shapes: T tokens in the step, E hidden_size, V vocab_size, R rows of a tile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError
from ..model.adapt import Adapt
from ..model.attention import Attend
from ..model.scores import Scores
from ..model.transformer import Transformer
from .protocol import Batch, IntArray
from .torch_attention import PagedAttention
from .torch_cache import PagedCache
from .torch_exact import TokenAttention
from .torch_lora import LoraSet
from .torch_transfer import upload

__all__ = [
    "Forward",
    "StepAttention",
    "TileAttention",
    "TiledForward",
    "WholeForward",
    "attention_for",
    "has_kernels",
    "obstacle_to_graphs",
    "tile_attention_for",
]

_log = logging.getLogger("llmserve.engine")

StepAttention: TypeAlias = Callable[[Batch, PagedCache, Scores], Attend]
"""Makes the attention of one step."""

TileAttention: TypeAlias = Callable[[Batch, PagedCache, Scores, IntArray], Attend]
"""Makes the attention of one tile, from the packed indices of its tokens."""

_TILE_BYTES = 128
"""Bytes of one column of a tile. Two of the widest vectors: flat arrays of any width are then whole
vectors, and no value is computed by the scalar code for what is left over."""
_NUM_TRIALS = 4


class Forward(Protocol):
    """The model over one step."""

    def hidden(self, batch: Batch, cache: PagedCache, fed: Tensor | None = None) -> Tensor:
        """The final hidden states of a step's tokens, [T, E]; their keys and values are cached.

        `fed` [T] are the tokens in place of those of a batch with `fed_rows`.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, E] → float32 [rows, V]."""

    def check(self) -> None:
        """Called before a cache is allocated: let go of the last one, and raise `ConfigError`
        unless what the mode promises holds on this machine."""


def has_kernels(device: torch.device) -> bool:
    """Whether a device runs our Triton kernels."""
    return device.type == "cuda" and find_spec("triton") is not None


def attention_for(device: torch.device) -> StepAttention:
    """How steps attend on a device: by our Triton kernel on CUDA, else by torch's operations.

    The kernel reads the cache where it lies; torch's operations gather it first. Without Triton a
    GPU gathers too, with a line in the log.
    """
    if not has_kernels(device):
        if device.type == "cuda":
            _log.warning(
                "triton is not installed: attention gathers the cache in every layer and integer "
                "weights are dequantized, which is slow; pip install 'llmserve[gpu]'"
            )
        return PagedAttention
    from .torch_gpu_attention import GpuAttention

    return GpuAttention


def obstacle_to_graphs(config: ModelConfig, device: torch.device) -> str | None:
    """Why decode steps of a model are not captured on a device; None: they are."""
    if not has_kernels(device):
        return "only attention by Triton kernels has steps of a fixed shape"
    if any(config.has_experts(index) for index in range(config.num_layers)):
        return "the host must know which experts a step's tokens go to"
    return None


def tile_attention_for(device: torch.device) -> TileAttention:
    """How tiles of the deterministic mode attend on a device.

    Raises:
        ConfigError: on CUDA without Triton: what torch's own attention does there to a row that
            has others beside it is not known.
    """
    if device.type == "cpu":
        return TokenAttention
    if not has_kernels(device):
        raise ConfigError(
            "the deterministic mode on CUDA needs triton; pip install 'llmserve[gpu]', or leave it "
            "out"
        )
    from .torch_gpu_attention import GpuTokenAttention

    return GpuTokenAttention


class WholeForward:
    """All tokens of a step in one pass."""

    def __init__(
        self,
        model: Transformer,
        adapters: LoraSet | None = None,
        *,
        attention: StepAttention = PagedAttention,
    ) -> None:
        self._model = model
        self._attention = attention
        self._scores = Scores.of(model.config)
        self._adapters = adapters

    def hidden(self, batch: Batch, cache: PagedCache, fed: Tensor | None = None) -> Tensor:
        """See `Forward`."""
        attend = self._attention(batch, cache, self._scores)
        adapt = None
        if self._adapters is not None:
            adapt = self._adapters.for_step(batch.adapter_ids, batch.cu_seqlens)
        token_ids, positions = upload([batch.token_ids, batch.positions], cache.device)
        token_ids = token_ids if fed is None else fed
        return self._model.hidden(token_ids, positions, attend, adapt)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward`."""
        return self._model.logits(hidden)

    def check(self) -> None:
        """Nothing is promised but the model's own arithmetic."""


class TiledForward:
    """Tiles of R rows, the last of a step filled up with rows that are thrown away."""

    def __init__(
        self,
        model: Transformer,
        adapters: LoraSet | None = None,
        *,
        attention: TileAttention = TokenAttention,
    ) -> None:
        self._model = model
        self._attention = attention
        model.fix_shapes()
        self._scores = Scores.of(model.config)
        self._adapters = adapters
        self.num_rows = _TILE_BYTES // next(model.parameters()).itemsize
        """R: 32 for float32, 64 for 16-bit types."""

    def hidden(self, batch: Batch, cache: PagedCache, fed: Tensor | None = None) -> Tensor:
        """See `Forward`.

        Tokens go by ascending position: what one reads, a sequence's own tokens and those of a
        prefix that another one computes in the same step, lies in its tile or an earlier one.
        """
        assert fed is None, "tokens are sorted by the host"
        order = np.argsort(batch.positions, kind="stable")
        tiles = [
            self._tile(batch, cache, order[start : start + self.num_rows])
            for start in range(0, len(order), self.num_rows)
        ]
        hidden = torch.cat(tiles)
        return torch.empty_like(hidden).index_copy_(0, cache.tensor(order), hidden)

    def _tile(self, batch: Batch, cache: PagedCache, tokens: IntArray) -> Tensor:
        attend = self._attention(batch, cache, self._scores, tokens)
        token_ids = cache.tensor(self._filled(batch.token_ids[tokens]))
        positions = cache.tensor(self._filled(batch.positions[tokens]))
        adapt = self._adapt(batch, tokens)
        return self._model.hidden(token_ids, positions, attend, adapt)[: len(tokens)]

    def _adapt(self, batch: Batch, tokens: IntArray) -> Adapt | None:
        """What the adapters add in a tile: each row is a sequence of its own."""
        if self._adapters is None or batch.adapter_ids is None:
            return None
        sequences = np.searchsorted(batch.cu_seqlens, tokens, side="right") - 1
        return self._adapters.for_step(
            self._filled(batch.adapter_ids[sequences]), np.arange(self.num_rows + 1)
        )

    def _filled(self, values: IntArray) -> IntArray:
        return np.pad(values, (0, self.num_rows - len(values)))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward`."""
        count, width = hidden.shape
        padded = hidden.new_zeros(-(-count // self.num_rows) * self.num_rows, width)
        padded[:count] = hidden
        tiles = padded.view(-1, self.num_rows, width).unbind()
        return torch.cat([self._model.logits(tile) for tile in tiles])[:count]

    def check(self) -> None:
        """Compute tiles of one token R times over: every row must come out alike.

        Products are the machine's library's, and elementwise operations are cut into shares by
        threads; that neither depends on a row's place in the tile is tried out, not assumed.

        Raises:
            ConfigError: rows differ, with this number of threads.
        """
        config = self._model.config
        device = next(self._model.parameters()).device
        for trial, adapt in product(range(_NUM_TRIALS), self._adaptations()):
            place = torch.full((self.num_rows,), trial, device=device)
            token_ids = place * (config.vocab_size // _NUM_TRIALS)
            positions = place * (config.max_seq_len // _NUM_TRIALS)
            hidden = self._model.hidden(token_ids, positions, self._attend_own_value, adapt)
            # A head's scores are made row by row, and need no trial.
            checked = [hidden] if config.head is not None else [hidden, self._model.logits(hidden)]
            for rows in checked:
                if not ((rows == rows[:1]) | rows.isnan()).all():
                    is_cpu = device.type == "cpu"
                    where = f"with {torch.get_num_threads()} threads" if is_cpu else f"on {device}"
                    raise ConfigError(
                        "the deterministic mode does not hold for this model on this machine "
                        f"{where}: rows of one tile are rounded differently"
                        f"{'; try 1 thread' if is_cpu else ''}"
                    )

    def _adaptations(self) -> list[Adapt | None]:
        """None, and each adapter on every row of a tile."""
        adapters = self._adapters
        if adapters is None:
            return [None]
        rows = np.ones(self.num_rows, dtype=np.int64)
        offsets = np.arange(self.num_rows + 1)
        count = len(adapters.names)
        return [adapters.for_step(rows * index, offsets) for index in range(count + 1)]

    def _attend_own_value(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, *joined: object
    ) -> Tensor:
        """Attention of a token that sees itself alone, whatever is done to queries and keys."""
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
