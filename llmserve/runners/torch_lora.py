"""LoRA adapters beside the torch model: each row of a step gets its own adapter's part.

The model joins query, key and value, and gate and input of the feed-forward; so do the matrices
here: the A of the parts one below the other, the B in blocks along the diagonal, with the scales
in them. Each adapter of a step is multiplied with the rows that are its own. In deterministic mode
it is multiplied with all rows, and its own are taken from the result: how many neighbours have the
same adapter then changes nothing, not even the order of a sum. Rows without an adapter get -0.0,
the one number that changes no other when it is added.

Shapes: T tokens in the step, r the ranks of the joined parts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import Adapter, LoraPair, Place
from ..config import ModelConfig
from ..model.adapt import Adapt
from ..quant.dtypes import Float32Array
from .protocol import BoolArray, IntArray
from .torch_transfer import upload

__all__ = ["LoraSet"]

_RANK_MULTIPLE = 16
"""Joined ranks are filled up to whole vectors of float32. With 8 outputs and 75 inputs, MKL rounds
a row otherwise from one place among 32 to another; filled up it never did, and costs as little."""


@dataclass(frozen=True, slots=True)
class _Matrices:
    """What one adapter adds to one projection of the model."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r], scaled

    def multiply(self, x: Tensor) -> Tensor:
        """[n, in] → [n, out]."""
        return F.linear(F.linear(x, self.a), self.b)


_Weights = dict[tuple[int, str], _Matrices]
"""By layer and the model's own name of the projection."""


class LoraSet:
    """The adapters of a loaded model, in the type and on the device of its arithmetic."""

    def __init__(
        self,
        config: ModelConfig,
        adapters: Sequence[Adapter],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        deterministic: bool = False,
    ) -> None:
        """Join and copy the matrices.

        Args:
            config: The model.
            adapters: What to load.
            dtype: Type of the model's arithmetic.
            device: Where the model is.
            deterministic: Whether what a row gets depends, bit for bit, on its own input, its
                adapter and the number of rows alone. The products cost as much for every adapter
                of a step as for all its rows.

        Raises:
            CheckpointError: an adapter does not fit the model.
        """
        self.names = tuple(adapter.name for adapter in adapters)
        """In the order of the ids: adapter i of a batch is entry i - 1."""
        self._device = torch.device(device)
        self._deterministic = deterministic
        self._weights: list[_Weights] = []
        for adapter in adapters:
            adapter.check(config)
            self._weights.append(_join(config, adapter, dtype, self._device))

    def for_step(self, adapter_ids: IntArray | None, cu_seqlens: IntArray) -> Adapt | None:
        """What the adapters add in a step over the packed tokens of its sequences.

        Args:
            adapter_ids: [S] 0: the base model, i: entry i - 1 of `names`. None: all 0.
            cu_seqlens: [S + 1] offsets of the sequences' tokens. The last is the number of rows
                that the model is run on: rows of padding are a sequence with id 0.

        Returns:
            None if no token of the step has an adapter.
        """
        if adapter_ids is None:
            return None
        ids = np.repeat(adapter_ids, np.diff(cu_seqlens))
        present = [int(adapter_id) for adapter_id in np.unique(ids) if adapter_id]
        if not present:
            return None
        if len(present) == 1 and ids.all():
            parts = [_Part(self._weights[present[0] - 1], None)]
        else:
            parts = [_Part(self._weights[i - 1], self._rows(ids == i)) for i in present]
        return _StepAdapt(parts, self._deterministic)

    def _rows(self, is_own: BoolArray) -> Tensor:
        return upload([np.flatnonzero(is_own)], self._device)[0]


class _Part(NamedTuple):
    """One adapter in a step."""

    weights: _Weights
    rows: Tensor | None
    """[n] its rows; None: all."""


class _StepAdapt:
    """`Adapt` for one step."""

    def __init__(self, parts: list[_Part], deterministic: bool) -> None:
        self._parts = parts
        self._deterministic = deterministic

    def __call__(self, layer_index: int, projection: str, x: Tensor) -> Tensor | None:
        """x [T, in] → [T, out], or None where no adapter of the step adapts the projection."""
        total: Tensor | None = None
        for weights, rows in self._parts:
            matrices = weights.get((layer_index, projection))
            if matrices is None:
                continue
            if rows is None:
                return matrices.multiply(x)
            if self._deterministic:
                added = matrices.multiply(x).index_select(0, rows)
            else:
                added = matrices.multiply(x.index_select(0, rows))
            if total is None:
                total = x.new_full((len(x), added.shape[1]), -0.0)
            total.index_copy_(0, rows, added)
        return total


def _join(
    config: ModelConfig, adapter: Adapter, dtype: torch.dtype, device: torch.device
) -> _Weights:
    weights: _Weights = {}
    for layer_index in sorted({place.layer_index for place in adapter.pairs}):
        for projection, parts in _parts_of(config).items():
            places = [Place(layer_index, part) for part in parts]
            if any(place in adapter.pairs for place in places):
                pairs = [adapter.pairs.get(place) for place in places]
                a, b = _join_pairs(pairs, list(parts.values()))
                weights[layer_index, projection] = _Matrices(
                    torch.from_numpy(a).to(device, dtype), torch.from_numpy(b).to(device, dtype)
                )
    return weights


def _parts_of(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The model's projections, each with the rows of the canonical ones that it joins."""
    inner = config.intermediate_size
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    gate_up = {"gate_up_proj": {"gate_proj": inner, "up_proj": inner}}
    return {
        "qkv_proj": qkv,
        "o_proj": {"o_proj": config.hidden_size},
        **(gate_up if config.is_gated else {"up_proj": {"up_proj": inner}}),
        "down_proj": {"down_proj": config.hidden_size},
    }


def _join_pairs(
    pairs: Sequence[LoraPair | None], sizes: Sequence[int]
) -> tuple[Float32Array, Float32Array]:
    """A [r, in] and scaled B [out, r]; rows of parts without a pair, and ranks added, are 0."""
    present = [pair for pair in pairs if pair is not None]
    rank = -(-sum(pair.rank for pair in present) // _RANK_MULTIPLE) * _RANK_MULTIPLE
    a = np.zeros((rank, present[0].a.shape[1]), np.float32)
    b = np.zeros((sum(sizes), rank), np.float32)
    row = column = 0
    for pair, size in zip(pairs, sizes, strict=True):
        if pair is not None:
            columns = slice(column, column + pair.rank)
            a[columns] = pair.a
            b[row : row + size, columns] = np.float32(pair.scale) * pair.b
            column = columns.stop
        row += size
    return a, b
