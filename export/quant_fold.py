"""Where the inputs of linear layers can be scaled without changing the model: fold sites.

A layer that reads x computes the same from x / s with its columns times s. The division moves into
what makes x: a norm's weights; the value projection, whose rows attention only averages; or the
input half of a gated feed-forward. Where nothing linear makes x there is no site: in blocks with
norms behind their halves, before experts (the router reads the same x) and after a plain GELU.

Sources: AWQ arXiv 2306.00978, SmoothQuant arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmserve.config import ModelConfig
from llmserve.layouts import block_norms
from llmserve.quant.dtypes import Float32Array, from_float32, to_float32

__all__ = ["FoldSite", "Tensors", "fold", "fold_sites", "tie"]

Tensors = dict[str, Float32Array]
"""A block's tensors by canonical name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSite:
    """Layers that read one input, and what makes it."""

    consumers: tuple[str, ...]
    """Layers, without `.weight`."""
    producer: str
    """A norm, or the linear layer whose outputs are the inputs."""
    is_norm: bool
    num_repeats: int = 1
    """Query heads that read one value head."""
    head_dim: int = 1


def fold_sites(config: ModelConfig, index: int) -> Iterator[FoldSite]:
    """The sites of block `index`."""
    block, norms = f"model.layers.{index}", block_norms(config)
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    if norms.before_attention is not None:
        yield FoldSite(
            consumers=tuple(f"{attention}.{part}_proj" for part in "qkv"),
            producer=f"{block}.{norms.before_attention}",
            is_norm=True,
        )
    yield FoldSite(
        consumers=(f"{attention}.o_proj",),
        producer=f"{attention}.v_proj",
        is_norm=False,
        num_repeats=config.num_heads // config.num_kv_heads,
        head_dim=config.head_dim,
    )
    if config.has_experts(index):
        return
    inputs = ("gate_proj", "up_proj") if config.is_gated else ("up_proj",)
    if norms.before_mlp is not None:
        yield FoldSite(
            consumers=tuple(f"{mlp}.{part}" for part in inputs),
            producer=f"{block}.{norms.before_mlp}",
            is_norm=True,
        )
    if config.is_gated:
        yield FoldSite(consumers=(f"{mlp}.down_proj",), producer=f"{mlp}.up_proj", is_norm=False)


def tie(site: FoldSite, values: Float32Array) -> Float32Array:
    """One number for each input [K] → those of inputs that one output makes are their largest."""
    if site.num_repeats == 1:
        return values
    heads = values.reshape(-1, site.num_repeats, site.head_dim)
    largest = np.repeat(heads.max(axis=1, keepdims=True), site.num_repeats, axis=1)
    tied: Float32Array = largest.reshape(-1)
    return tied


def fold(
    tensors: Tensors, site: FoldSite, scales: Float32Array, config: ModelConfig
) -> tuple[Tensors, Float32Array]:
    """What changes when the site's inputs are divided by `scales` [K]: tensors, and the divisors.

    A norm's new weights are numbers of the model's type; the columns take up what that rounding
    changed, so that the model computes what it did. The divisors say what the inputs were divided
    by in the end.
    """
    changed: Tensors = {}
    if site.is_norm:
        scales = _fold_norm(tensors, site, scales, config, changed)
    else:
        heads = scales.reshape(-1, site.num_repeats, site.head_dim)
        rows = heads[:, 0].reshape(-1)
        for name in (f"{site.producer}.weight", f"{site.producer}.bias"):
            if name in tensors:
                old = tensors[name]
                changed[name] = old / (rows[:, None] if old.ndim == 2 else rows)
    for layer in site.consumers:
        changed[f"{layer}.weight"] = tensors[f"{layer}.weight"] * scales
    return changed, scales


def _fold_norm(
    tensors: Tensors, site: FoldSite, scales: Float32Array, config: ModelConfig, changed: Tensors
) -> Float32Array:
    offset = np.float32(config.norm_weight_offset)
    weight = tensors[f"{site.producer}.weight"] + offset
    stored = to_float32(from_float32(weight / scales - offset, config.dtype))
    is_kept = (stored + offset != 0) & np.isfinite(stored)
    changed[f"{site.producer}.weight"] = stored = np.where(is_kept, stored, weight - offset)
    scales = np.where(is_kept, weight / np.where(is_kept, stored + offset, 1), 1)
    scales = scales.astype(np.float32)
    if f"{site.producer}.bias" in tensors:
        changed[f"{site.producer}.bias"] = tensors[f"{site.producer}.bias"] / scales
    return scales
