"""Paged attention in Triton: prefill and decode over the cache's own blocks, nothing gathered.

A program takes one tile: consecutive new tokens of one sequence, times the G query heads that share
a key head. It reads the context in spans of `SPAN` tokens counted from position 0, each by its own
online softmax (FlashAttention, arXiv 2205.14135, section 3.1), and joins spans in ascending order.
A tile of few tokens has a program for each span and a second pass that joins them (Flash-Decoding);
a tile of a prefill joins its spans itself, with the same arithmetic. Places that a row does not see
are exact identities of both, so a row's result follows from its own position and context, whatever
other rows and sequences are in the step. Tiles of the two kinds may round differently: they have
other shapes.

A cache in eight bits is read as it lies: codes are multiplied as numbers of the queries' type,
which holds them exactly, the scales of keys go to the products and those of values to the weights.

Shapes: T tokens in the step, S sequences, H query heads, KV key heads, G = H / KV, D head_dim,
P tokens of sequences read in spans, N most spans of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_cache import LayerCache
from .torch_triton_codes import cache_kind, numbers_of

__all__ = ["MOST_HEAD_DIM", "SPAN", "TILE_FIELDS", "TileReads", "paged_attention", "tile_tokens"]

MOST_HEAD_DIM = 512
"""A tile of wider heads would not fit into the memory that a program's threads share."""

SPAN = 256
"""Tokens of a context that one program reads for a decode: at 8 key heads and 1,024 tokens one
sequence has 32 programs."""

TILE_FIELDS = 5
"""Numbers that describe a tile: its sequence, its first packed token, how many tokens, the position
of the first, and the place of its first token among P."""

_LEAST_ROWS = 16  # of a matrix product on tensor cores
_PREFILL_ROWS = 64
_PREFILL_VALUES = {2: 16384, 4: 4096}
"""By the bytes of a query's value: most values of a prefill's tile. Larger ones do not fit into
registers, where products of float32 take more room."""
_CONTEXT_VALUES = 8192
"""Most values of keys that are read at once: more do not fit into the memory that a program's
threads share, 99 KB on most GPUs."""
_OF_A_STEP = ("tiles", "tables", "rows", "table_stride", "num_spans")
"""Arguments that differ from step to step. Triton would compile a kernel anew, while requests wait,
where one is 1, or it or an address a multiple of 16, for the first time."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileReads:
    """What one cache group's tiles read in a step; tensors are int64, on the cache's device."""

    block_tables: Tensor  # [S, most blocks of one sequence]
    block_size: int
    window: int | None
    """Tokens that a query sees, its own included; None: all before it."""
    prefill_tiles: Tensor  # [any, TILE_FIELDS]
    span_tiles: Tensor  # [any, TILE_FIELDS]
    span_rows: Tensor  # [P, 2] packed token, and how many spans it has
    max_spans: int
    """N; 0: no tile is read in spans."""


def tile_tokens(q: Tensor, num_kv_heads: int, *, is_prefill: bool) -> int:
    """Most tokens of one tile, for queries [T, H, D]."""
    group_size = q.shape[1] // num_kv_heads
    return _rows(q, group_size, is_prefill=is_prefill) // group_size


def paged_attention(
    q: Tensor, layer: LayerCache, reads: TileReads, *, scale: float, cap: float | None
) -> Tensor:
    """Attention of a step's tokens; their keys and values are in the cache already.

    Args:
        q: Queries [T, H, D].
        layer: The pools of one layer, in the type of `q` or in eight bits.
        reads: What each tile reads.
        scale: Factor of the products of queries and keys.
        cap: Soft cap of the scaled products; None: they have none.

    Returns:
        [T, H, D].
    """
    q = q.contiguous()
    out = torch.empty_like(q)
    num_kv_heads, head_dim = layer.keys.shape[1:]
    group_size = q.shape[1] // num_kv_heads
    width = _width(head_dim)
    constants = {
        "SCALE": scale, "CAP": cap or 0.0, "WINDOW": reads.window or 0, "SPAN": SPAN,
        "BLOCK_SIZE": reads.block_size, "KV": num_kv_heads, "G": group_size, "D": head_dim,
        "WIDTH": width, "COLUMNS": max(16, min(128 // q.itemsize, _CONTEXT_VALUES // width)),
        "KIND": cache_kind(layer), "enable_fp_fusion": True,
    }  # fmt: skip
    tables = reads.block_tables
    if len(reads.prefill_tiles):
        _prefill_kernel[len(reads.prefill_tiles), num_kv_heads](
            q, *layer, out, reads.prefill_tiles, tables, tables.stride(0),
            ROWS=_rows(q, group_size, is_prefill=True), num_warps=8, **constants,
        )  # fmt: skip
    if reads.max_spans:
        shape = (len(reads.span_rows), q.shape[1], reads.max_spans)
        peaks, sums = q.new_empty((2, *shape), dtype=torch.float32)
        parts = q.new_empty((*shape, head_dim), dtype=torch.float32)
        _span_kernel[len(reads.span_tiles), num_kv_heads, reads.max_spans](
            q, *layer, peaks, sums, parts, reads.span_tiles, tables, tables.stride(0),
            reads.max_spans, ROWS=_rows(q, group_size, is_prefill=False),
            num_warps=4 if width * q.itemsize < 512 else 8, **constants,
        )  # fmt: skip
        _join_kernel[shape[:2]](
            peaks, sums, parts, out, reads.span_rows, reads.max_spans,
            H=q.shape[1], D=head_dim, WIDTH=width, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _rows(q: Tensor, group_size: int, *, is_prefill: bool) -> int:
    """Rows of a tile: a power of two, at least the heads of one token."""
    least: int = max(_LEAST_ROWS, triton.next_power_of_2(group_size))
    if not is_prefill:
        return least
    return max(least, min(_PREFILL_ROWS, _PREFILL_VALUES[q.itemsize] // _width(q.shape[-1])))


def _width(head_dim: int) -> int:
    width: int = triton.next_power_of_2(head_dim)
    return max(_LEAST_ROWS, width)


@triton.jit
def _tile_rows(q, tile, kv_head, G: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
               WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """A tile's queries [ROWS, WIDTH], where they lie, which of them are real, their positions."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    token, head = rows // G, kv_head * G + rows % G
    is_real = token < tl.load(tile + 2)
    offsets = ((tl.load(tile + 1) + token) * (KV * G) + head)[:, None] * D + dims[None, :]
    is_value = is_real[:, None] & (dims < D)[None, :]
    queries = tl.load(q + offsets, mask=is_value, other=0.0)
    return queries, offsets, is_value, tl.load(tile + 3) + token


@triton.jit
def _seen(tile, WINDOW: tl.constexpr):
    """The first position that a tile's first token sees, and the one after its last token."""
    first = tl.load(tile + 3)
    lowest = first * 0
    if WINDOW > 0:
        lowest = tl.maximum(first - WINDOW + 1, 0)
    return lowest, first + tl.load(tile + 2)


@triton.jit
def _scores(products, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Scaled, capped products, times log2(e) for `exp2`; tanh x = 1 - 2 / (e^2x + 1)."""
    scores = products * SCALE
    if CAP > 0:
        scores = CAP * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2_E / CAP)) + 1.0))
    return scores * _LOG2_E


@triton.jit
def _shrink(old, new):
    """2^(old - new), where `new` >= `old` may both be minus infinity: then 0."""
    return tl.exp2(old - tl.where(new == float("-inf"), 0.0, new))


@triton.jit
def _attend_span(queries, positions, keys, values, key_scales, value_scales, table, span, lowest,
                 end, kv_head, SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                 SPAN: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
                 WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                 KIND: tl.constexpr):  # fmt: skip
    """What the rows see of one span: peak [ROWS], sum [ROWS], values weighted [ROWS, WIDTH]."""
    dims = tl.arange(0, WIDTH)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    unit: tl.constexpr = 256.0 if KIND == 2 else 1.0  # of codes as numbers
    # Weights as small as an int8's scales would leave float16's range.
    lift: tl.constexpr = 256.0 if KIND == 2 else 64.0
    start = tl.maximum(span * SPAN, lowest // COLUMNS * COLUMNS)
    stop = tl.minimum(span * SPAN + SPAN, end)
    for first in range(start, stop, COLUMNS):
        places = first + tl.arange(0, COLUMNS)
        # Blocks before the window may be another's by now, those after the end were never ours.
        is_read = (places >= lowest) & (places < stop)
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_read, other=0)
        slots = blocks * BLOCK_SIZE + places % BLOCK_SIZE
        offsets = ((slots * KV + kv_head) * D)[:, None] + dims[None, :]
        is_value = is_read[:, None] & (dims < D)[None, :]
        k = tl.load(keys + offsets, mask=is_value, other=0)
        v = tl.load(values + offsets, mask=is_value, other=0)
        if KIND > 0:
            k, v = numbers_of(k, queries.dtype, KIND), numbers_of(v, queries.dtype, KIND)
        products = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if KIND > 0:
            at = slots * KV + kv_head
            products *= (tl.load(key_scales + at, mask=is_read, other=0.0) * unit)[None, :]
        is_seen = is_read[None, :] & (places[None, :] <= positions[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (places[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(is_seen, _scores(products, SCALE, CAP), float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = _shrink(scores, higher[:, None])
        kept = _shrink(peak, higher)
        total = total * kept + tl.sum(weights, 1)
        if KIND > 0:
            weights *= (tl.load(value_scales + at, mask=is_read, other=0.0) * lift)[None, :]
        weighted = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        out = out * kept[:, None] + weighted
        peak = higher
    if KIND > 0:
        out *= unit / lift
    return peak, total, out


@triton.jit(do_not_specialize=_OF_A_STEP)
def _prefill_kernel(q, keys, values, key_scales, value_scales, out, tiles, tables, table_stride,
                    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                    SPAN: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV: tl.constexpr,
                    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                    COLUMNS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """One tile and key head, all spans one after the other."""
    tile, kv_head = tiles + tl.program_id(0) * 5, tl.program_id(1)
    queries, offsets, is_value, positions = _tile_rows(q, tile, kv_head, G, KV, D, WIDTH, ROWS)
    table = tables + tl.load(tile) * table_stride
    lowest, end = _seen(tile, WINDOW)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = tl.zeros([ROWS, WIDTH], tl.float32)
    for span in range(lowest // SPAN, (end - 1) // SPAN + 1):
        span_peak, span_total, part = _attend_span(
            queries, positions, keys, values, key_scales, value_scales, table, span, lowest, end,
            kv_head, SCALE, CAP, WINDOW, SPAN, BLOCK_SIZE, KV, D, WIDTH, COLUMNS, ROWS, KIND,
        )  # fmt: skip
        higher = tl.maximum(peak, span_peak)
        kept, added = _shrink(peak, higher), _shrink(span_peak, higher)
        total = total * kept + span_total * added
        whole = whole * kept[:, None] + part * added[:, None]
        peak = higher
    total = tl.where(total > 0, total, 1.0)  # rows of no token saw nothing
    tl.store(out + offsets, (whole / total[:, None]).to(out.dtype.element_ty), mask=is_value)


@triton.jit(do_not_specialize=_OF_A_STEP)
def _span_kernel(q, keys, values, key_scales, value_scales, peaks, sums, parts, tiles, tables,
                 table_stride, num_spans, SCALE: tl.constexpr, CAP: tl.constexpr,
                 WINDOW: tl.constexpr, SPAN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                 KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                 COLUMNS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """One tile, key head and span: its part of the result, to be joined."""
    tile, kv_head = tiles + tl.program_id(0) * 5, tl.program_id(1)
    lowest, end = _seen(tile, WINDOW)
    span = lowest // SPAN + tl.program_id(2)
    if span * SPAN < end:
        queries, _, is_value, positions = _tile_rows(q, tile, kv_head, G, KV, D, WIDTH, ROWS)
        table = tables + tl.load(tile) * table_stride
        peak, total, part = _attend_span(
            queries, positions, keys, values, key_scales, value_scales, table, span, lowest, end,
            kv_head, SCALE, CAP, WINDOW, SPAN, BLOCK_SIZE, KV, D, WIDTH, COLUMNS, ROWS, KIND,
        )  # fmt: skip
        rows = tl.arange(0, ROWS)
        row = (tl.load(tile + 4) + rows // G) * (KV * G) + kv_head * G + rows % G
        place = row * num_spans + tl.program_id(2)
        is_real = rows // G < tl.load(tile + 2)
        tl.store(peaks + place, peak, mask=is_real)
        tl.store(sums + place, total, mask=is_real)
        offsets = place[:, None] * D + tl.arange(0, WIDTH)[None, :]
        tl.store(parts + offsets, part, mask=is_value)


@triton.jit(do_not_specialize=_OF_A_STEP)
def _join_kernel(peaks, sums, parts, out, rows, num_spans, H: tl.constexpr, D: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """One token and query head: its spans in ascending order, as in `_prefill_kernel`."""
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    place = (row * H + head).to(tl.int64) * num_spans
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    whole = tl.zeros([WIDTH], tl.float32)
    for span in range(tl.load(rows + row * 2 + 1)):
        span_peak = tl.load(peaks + place + span)
        part = tl.load(parts + (place + span) * D + dims, mask=dims < D, other=0.0)
        higher = tl.maximum(peak, span_peak)
        kept, added = _shrink(peak, higher), _shrink(span_peak, higher)
        total = total * kept + tl.load(sums + place + span) * added
        whole = whole * kept + part * added
        peak = higher
    total = tl.where(total > 0, total, 1.0)  # rows of padding have no spans
    offsets = (tl.load(rows + row * 2) * H + head) * D + dims
    tl.store(out + offsets, (whole / total).to(out.dtype.element_ty), mask=dims < D)
