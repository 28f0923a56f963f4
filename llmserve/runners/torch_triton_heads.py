"""New queries, keys and values on their way to attention, in Triton: norm, rotation, cache write.

One kernel takes the heads of a step's tokens as the joined projection left them. Queries and keys
are normalized head by head where the model does so, turned by their positions, and rounded; queries
are put into an array of their own, keys and values into their slots of the paged cache, in its
form.

Sources: RoPE arXiv 2104.09864, in the halves layout of `model/layers.py`; norms of queries and keys
arXiv 2302.05442, section 3.1; eight bits as in `torch_cache_form.py`.

Shapes: T tokens in the step, H query heads, KV key heads, D head_dim, R turned values of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..model.layers import Rotation
from .torch_cache import LayerCache
from .torch_triton_codes import cache_kind, to_codes
from .torch_triton_elementwise import Norm, inverse_root

__all__ = ["HeadNorms", "keep_heads"]

_PROGRAM_VALUES = 1024


class HeadNorms(NamedTuple):
    """Norms of single heads; None: those heads have none."""

    queries: Norm | None = None  # of width D
    keys: Norm | None = None


def keep_heads(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerCache, slots: Tensor,
    rotation: Rotation | None = None, norms: HeadNorms | None = None,
) -> Tensor:  # fmt: skip
    """Write keys and values to their slots; return the queries.

    Args:
        q: [T, H, D]; tokens may lie apart, a token's heads are contiguous.
        k: [T, KV, D], likewise.
        v: As `k`.
        layer: The layer's pools, in the type of `q` or in eight bits.
        slots: int64 [T].
        rotation: Turns of the tokens' queries and keys; None: they have none.
        norms: Norms of their heads; None: they have none.

    Returns:
        [T, H, D]: `q` itself where nothing is done to queries.
    """
    norms = norms or HeadNorms()
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    is_moved = rotation is not None or norms.queries is not None
    out = q.new_empty(q.shape) if is_moved else q
    width = triton.next_power_of_2(head_dim)
    heads = max(1, _PROGRAM_VALUES // width)
    query_parts = triton.cdiv(num_heads, heads) if is_moved else 0
    key_parts = triton.cdiv(num_kv_heads, heads)
    some = norms.queries or norms.keys
    if num_tokens:
        _heads_kernel[num_tokens, query_parts + 2 * key_parts](
            q, k, v, out, *layer, slots, *_turns(rotation), norms.queries and norms.queries.weight,
            norms.keys and norms.keys.weight, q.stride(0), k.stride(0), v.stride(0),
            0 if rotation is None else rotation.cos.stride(0), 0.0 if some is None else some.eps,
            OFFSET=0.0 if some is None else some.offset, H=num_heads, KV=num_kv_heads, D=head_dim,
            R=0 if rotation is None else 2 * rotation.cos.shape[-1], WIDTH=width, HEADS=heads,
            QUERY_PARTS=query_parts, KEY_PARTS=key_parts, KIND=cache_kind(layer),
            # A contracted product would round a code otherwise than the plain form does.
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _turns(rotation: Rotation | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines, rows [T, R / 2] as far apart as the table's."""
    if rotation is None:
        return None, None
    assert rotation.cos.stride(0) == rotation.signed_sin.stride(0), "both are parts of one table"
    return rotation.cos, rotation.signed_sin[..., 1:, :]


@triton.jit
def _scaled(x, squares, norm, dims, eps, OFFSET: tl.constexpr, D: tl.constexpr):
    """Values [HEADS, WIDTH] at `dims` of heads with these sums of squares, normalized."""
    is_there = (dims >= 0) & (dims < D)
    factors = tl.load(norm + dims, mask=is_there, other=0.0).to(tl.float32) + OFFSET
    return x * inverse_root(squares, D, eps)[:, None] * factors[None, :]


@triton.jit
def _turned(source, heads, COUNT: tl.constexpr, cos, sin, norm, eps, OFFSET: tl.constexpr,
            D: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Heads [HEADS, WIDTH] of one token, normalized and turned, in float32."""
    dims = tl.arange(0, WIDTH)
    is_head, is_dim = (heads < COUNT)[:, None], (dims < D)[None, :]
    at = source + heads[:, None] * D
    x = tl.load(at + dims[None, :], mask=is_head & is_dim, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, 1)
    if norm is not None:
        x = _scaled(x, squares, norm, dims, eps, OFFSET, D)
    if R > 0:
        is_first, is_turned = dims < R // 2, dims < R
        other = tl.where(is_first, dims + R // 2, dims - R // 2)
        y = tl.load(at + other[None, :], mask=is_head & is_turned[None, :], other=0.0)
        y = y.to(tl.float32)
        if norm is not None:
            y = _scaled(y, squares, norm, other, eps, OFFSET, D)
        pair = tl.where(is_first, dims, other)
        c = tl.load(cos + pair, mask=is_turned, other=0.0).to(tl.float32)
        s = tl.load(sin + pair, mask=is_turned, other=0.0).to(tl.float32)
        s = tl.where(is_first, -s, s)
        x = tl.where(is_turned[None, :], x * c[None, :] + y * s[None, :], x)
    return x


@triton.jit
def _kept(x, pool, scales, slot, heads, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
          KIND: tl.constexpr):  # fmt: skip
    """Put heads [HEADS, WIDTH], already rounded to the arithmetic's type, into a slot."""
    dims = tl.arange(0, WIDTH)
    place = slot * KV + heads
    is_head = heads < KV
    at = pool + place[:, None] * D + dims[None, :]
    is_value = is_head[:, None] & (dims < D)[None, :]
    if KIND == 0:
        tl.store(at, x.to(pool.dtype.element_ty), mask=is_value)
    else:
        codes, head_scales = to_codes(tl.where(is_value, x.to(tl.float32), 0.0), KIND)
        tl.store(at, codes, mask=is_value)
        tl.store(scales + place, head_scales, mask=is_head)


@triton.jit(do_not_specialize=["slots"])  # wherever a step's indices lie there is one kernel
def _heads_kernel(q, k, v, out, keys, values, key_scales, value_scales, slots, cos, sin, q_norm,
                  k_norm, q_stride, k_stride, v_stride, turn_stride, eps, OFFSET: tl.constexpr,
                  H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
                  WIDTH: tl.constexpr, HEADS: tl.constexpr, QUERY_PARTS: tl.constexpr,
                  KEY_PARTS: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Some heads of one token, all queries, all keys or all values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    kept = q.dtype.element_ty
    if R > 0:
        cos += token * turn_stride
        sin += token * turn_stride
    if part < QUERY_PARTS:
        heads, dims = part * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
        x = _turned(q + token * q_stride, heads, H, cos, sin, q_norm, eps, OFFSET, D, R, WIDTH)
        is_value = (heads < H)[:, None] & (dims < D)[None, :]
        at = out + token * (H * D) + heads[:, None] * D + dims[None, :]
        tl.store(at, x.to(kept), mask=is_value)
    elif part < QUERY_PARTS + KEY_PARTS:
        heads = (part - QUERY_PARTS) * HEADS + tl.arange(0, HEADS)
        x = _turned(k + token * k_stride, heads, KV, cos, sin, k_norm, eps, OFFSET, D, R, WIDTH)
        _kept(x.to(kept), keys, key_scales, slot, heads, KV, D, WIDTH, KIND)
    else:
        heads = (part - QUERY_PARTS - KEY_PARTS) * HEADS + tl.arange(0, HEADS)
        x = _turned(v + token * v_stride, heads, KV, None, None, None, eps, OFFSET, D, 0, WIDTH)
        _kept(x.to(kept), values, value_scales, slot, heads, KV, D, WIDTH, KIND)
