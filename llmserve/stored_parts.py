"""Where files of other families keep canonical tensors: joined, renamed, or turned round.

GPT-2 keeps query, key and value in one tensor, and its linear weights as [in, out]; Phi-3 keeps
query, key and value in one, gate and input of the feed-forward in another; Mixtral has names of its
own for experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Part", "Shape", "gpt2_parts", "mixtral_parts", "phi3_parts", "whole"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The place of one canonical tensor: rows `start` to `stop` of a stored one, once turned."""

    name: str
    """Name of the stored tensor."""
    shape: Shape
    """Shape of the stored tensor."""
    start: int
    """First row, along the output axis."""
    stop: int
    """Row after the last one."""
    is_transposed: bool = False
    """Whether the stored tensor is [in, out]."""


def whole(name: str, shape: Shape) -> Part:
    """A stored tensor that is one canonical tensor."""
    return Part(name=name, shape=shape, start=0, stop=shape[0])


_GPT2_NAMES = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_TOP_NAMES = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_GPT2_FUSED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def gpt2_parts(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Part]]:
    """Canonical name → place in GPT-2's files, where scores of tokens are a `classifier`."""
    scores = "classifier" if "score.bias" in shapes else "score"
    for name, shape in shapes.items():
        if name.startswith(("score.", "qa_outputs.")):
            yield name, whole(name.replace("score", scores), shape)
            continue
        if name in _GPT2_TOP_NAMES:
            yield name, whole(_GPT2_TOP_NAMES[name], shape)
            continue
        _, _, index, inner = name.split(".", 3)
        layer, _, kind = inner.rpartition(".")
        is_fused = layer in _GPT2_FUSED
        stored = "attn.c_attn" if is_fused else _GPT2_NAMES[layer]
        rows = shape[0]
        start = _GPT2_FUSED.get(layer, 0) * rows
        turned = (3 * rows if is_fused else rows, *shape[1:])
        yield (
            name,
            Part(
                name=f"transformer.h.{index}.{stored}.{kind}",
                shape=turned[::-1],
                start=start,
                stop=start + rows,
                is_transposed=len(shape) == 2,
            ),
        )


_PHI3_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def phi3_parts(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Part]]:
    """Canonical name → place in Phi-3's files."""
    place_of = {part: (fused, parts) for fused, parts in _PHI3_FUSED.items() for part in parts}
    for name, shape in shapes.items():
        half, _, projection = name.removesuffix(".weight").rpartition(".")
        if projection not in place_of:
            yield name, whole(name, shape)
            continue
        fused, parts = place_of[projection]
        rows = {part: shapes[f"{half}.{part}.weight"][0] for part in parts}
        start = sum(rows[part] for part in parts[: parts.index(projection)])
        yield (
            name,
            Part(
                name=f"{half}.{fused}.weight",
                shape=(sum(rows.values()), shape[1]),
                start=start,
                stop=start + shape[0],
            ),
        )


_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral_parts(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Part]]:
    """Canonical name → place in Mixtral's files."""
    for name, shape in shapes.items():
        layer, _, inner = name.partition(".mlp.")
        if not inner:
            yield name, whole(name, shape)
            continue
        for ours, theirs in _MIXTRAL_NAMES.items():
            inner = inner.replace(f".{ours}.", f".{theirs}.")
        yield name, whole(f"{layer}.block_sparse_moe.{inner}", shape)
