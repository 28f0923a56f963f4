"""The paged KV cache of the torch runner: one pool of slots for each cache group.

A slot holds one token's key and value of one layer; slots are counted over the group's whole pool.
They are kept in the type of the arithmetic, or in eight bits beside scales (`torch_cache_form.py`).
Each pool has one slot more that is never written and stays zero. Reads past a sequence's end are
directed to it: what others left in the pool, NaN included, never reaches a result (decision 3). And
it has a spare slot, into which rows of padding write what nobody reads (`torch_static_step.py`).

Shapes: B sequences or queries read side by side, L places read for each, KV key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cache_groups import LayerGroup
from .protocol import BoolArray, IntArray
from .torch_cache_form import CacheForm
from .torch_transfer import upload

__all__ = ["LayerCache", "PagedCache"]


class LayerCache(NamedTuple):
    """The pools of one layer."""

    keys: Tensor  # [slots, KV, D]
    values: Tensor  # [slots, KV, D]
    key_scales: Tensor | None = None  # [slots, KV] float32, of a cache in eight bits
    value_scales: Tensor | None = None  # [slots, KV]


class PagedCache:
    """Keys and values of every layer, in the pool of the layer's group."""

    def __init__(
        self, groups: Sequence[LayerGroup], *, num_blocks: tuple[int, ...], block_size: int,
        num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        form: CacheForm | None = None,
    ) -> None:  # fmt: skip
        """Allocate `num_blocks[g] * block_size` slots, spare and null slot for group g's layers.

        `dtype` is the arithmetic's, and the pools' too unless there is a `form`.
        """
        self.block_size = block_size
        self.dtype, self.device, self.form = dtype, device, form
        self.groups = tuple(groups)
        self.spare_slots = [count * block_size for count in num_blocks]
        """Of each group: the slot that padding is written to."""
        self.null_slots = [spare + 1 for spare in self.spare_slots]
        """Of each group: the slot that stays zero."""
        self.group_of = {
            layer: index for index, group in enumerate(groups) for layer in group.layers
        }
        """Layer → its group."""
        shapes = [
            (self.null_slots[self.group_of[layer]] + 1, num_kv_heads, head_dim)
            for layer in sorted(self.group_of)
        ]
        stored = dtype if form is None else form.stored
        self.layers = [
            LayerCache(
                *(torch.zeros(shape, dtype=stored, device=device) for _ in range(2)),
                *(torch.zeros(shape[:2], device=device) for _ in range(0 if form is None else 2)),
            )
            for shape in shapes
        ]
        """The pools of each layer."""
        self.keys = [layer.keys for layer in self.layers]
        """[slots, KV, D] of each layer."""
        self.values = [layer.values for layer in self.layers]
        """[slots, KV, D] of each layer."""
        # The same memory as one sequence of all slots, [1, KV, slots, D]: made once, since a view
        # costs as much as a small operation.
        self.whole_keys = [keys.transpose(0, 1)[None] for keys in self.keys]
        self.whole_values = [values.transpose(0, 1)[None] for values in self.values]

    def copy_blocks(self, group: int, copies: IntArray) -> None:
        """Copy whole blocks, `copies` [C, 2] of (from, to); all are read before any is written."""
        slots = copies[:, :, None] * self.block_size + np.arange(self.block_size)  # [C, 2, block]
        source, target = (self.tensor(slots[:, side].reshape(-1)) for side in (0, 1))
        for layer in self.groups[group].layers:
            for pool in self.layers[layer]:
                if pool is not None:
                    pool.index_copy_(0, target, pool.index_select(0, source))

    def write(self, layer_index: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep keys and values [n, KV, D] in `slots` [n], rounded to the cache's form."""
        layer = self.layers[layer_index]
        if self.form is None:
            layer.keys.index_copy_(0, slots, k)
            layer.values.index_copy_(0, slots, v)
            return
        coded = (*self.form.encode(k), *self.form.encode(v))
        pools = (layer.keys, layer.key_scales, layer.values, layer.value_scales)
        for pool, new in zip(pools, coded, strict=True):
            assert pool is not None, "a cache in eight bits has scales"
            pool.index_copy_(0, slots, new)

    def read(self, layer_index: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, KV, D] of `slots` [n], in the type of the arithmetic."""
        layer = self.layers[layer_index]
        keys, values = layer.keys.index_select(0, slots), layer.values.index_select(0, slots)
        if self.form is None:
            return keys, values
        assert layer.key_scales is not None, "a cache in eight bits has scales"
        assert layer.value_scales is not None, "a cache in eight bits has scales"
        key_scales = layer.key_scales.index_select(0, slots)
        value_scales = layer.value_scales.index_select(0, slots)
        return (
            self.form.decode(keys, key_scales).to(self.dtype),
            self.form.decode(values, value_scales).to(self.dtype),
        )

    def places(
        self, group: int, tables: IntArray, firsts: IntArray, ends: IntArray, width: int
    ) -> tuple[IntArray, BoolArray]:
        """The slots to read for positions `firsts`..`ends - 1` of B block tables.

        Reading starts where the block of `firsts` does, so that blocks given back before it are
        not looked at, and goes over `width` places; those outside lead to the null slot.

        Returns:
            Slots [B, width], and which of them are outside, [B, width].
        """
        size = self.block_size
        blocks = firsts[:, None] // size + np.arange(-(-width // size))
        if firsts.any() or blocks.shape[1] > tables.shape[1]:
            tables = np.take_along_axis(tables, np.minimum(blocks, tables.shape[1] - 1), axis=1)
        else:
            tables = tables[:, : blocks.shape[1]]
        slots = (tables[:, :, None] * size + np.arange(size)).reshape(len(tables), -1)[:, :width]
        skipped = firsts % size
        place = np.arange(width)
        is_outside = place >= (skipped + ends - firsts)[:, None]
        if skipped.any():
            is_outside |= place < skipped[:, None]
        if is_outside.any():
            slots = np.where(is_outside, self.null_slots[group], slots)
        return slots, is_outside

    def tensor(self, values: IntArray) -> Tensor:
        """Indices as a tensor beside the cache; the host does not wait for the copy."""
        return upload([values], self.device)[0]

    def mask(self, is_hidden: BoolArray) -> Tensor:
        """What is added to scores: minus infinity where hidden, else zero."""
        hidden = upload([is_hidden], self.device)[0]
        zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return zeros.masked_fill_(hidden, float("-inf"))
