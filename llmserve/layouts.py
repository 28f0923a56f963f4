"""Where each family's files keep the tensors that llmserve knows under one set of names.

Canonical names are those of Hugging Face's Llama; linear weights are [out, in]. A family's stored
tensor holds one canonical tensor or several one after another (`Part`): GPT-2 keeps query, key and
value in one, and its linear weights as [in, out].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig

__all__ = [
    "Family",
    "Part",
    "expected_tensors",
    "is_ignored",
    "linear_layers",
    "stored_name",
    "stored_parts",
]

Family = Literal["llama", "mistral", "gpt2", "llmserve"]
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


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name → shape of every tensor that a model of this configuration has."""
    width = config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    if config.positions == "learned":
        shapes["model.embed_positions.weight"] = (config.max_seq_len, width)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        shapes |= _norm(f"{layer}.input_layernorm", config)
        shapes |= _attention(f"{layer}.self_attn", config)
        shapes |= _norm(f"{layer}.post_attention_layernorm", config)
        shapes |= _mlp(f"{layer}.mlp", config)
    shapes |= _norm("model.norm", config)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def linear_layers(config: ModelConfig) -> list[str]:
    """Names of the linear layers, without `.weight`: what can be quantized."""
    names = (name.removesuffix(".weight") for name in expected_tensors(config))
    return [name for name in names if name.endswith(("_proj", "lm_head"))]


def stored_parts(config: ModelConfig, family: Family) -> dict[str, Part]:
    """Canonical name → where the files of `family` hold it."""
    if family == "gpt2":
        return dict(_gpt2_parts(config))
    return {
        name: Part(name=name, shape=shape, start=0, stop=shape[0])
        for name, shape in expected_tensors(config).items()
    }


def is_ignored(name: str, family: Family) -> bool:
    """Whether a stored tensor is a constant that some programs save and none needs."""
    if family == "gpt2":
        return name.endswith((".attn.bias", ".attn.masked_bias"))
    return family in ("llama", "mistral") and name.endswith(".rotary_emb.inv_freq")


def stored_name(name: str, family: Family) -> str:
    """The name that `Part` uses for a tensor called `name` in a file of `family`.

    GPT-2's own files leave out the `transformer.` that programs put before all but the head.
    """
    if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def _norm(name: str, config: ModelConfig) -> dict[str, Shape]:
    shape = (config.hidden_size,)
    if config.norm == "rmsnorm":
        return {f"{name}.weight": shape}
    return {f"{name}.weight": shape, f"{name}.bias": shape}


def _linear(name: str, out: int, width: int, *, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (out, width)}
    if bias:
        shapes[f"{name}.bias"] = (out,)
    return shapes


def _attention(name: str, config: ModelConfig) -> dict[str, Shape]:
    width, bias = config.hidden_size, config.attention_bias
    return {
        **_linear(f"{name}.q_proj", config.q_size, width, bias=bias),
        **_linear(f"{name}.k_proj", config.kv_size, width, bias=bias),
        **_linear(f"{name}.v_proj", config.kv_size, width, bias=bias),
        **_linear(f"{name}.o_proj", width, config.q_size, bias=config.attention_output_bias),
    }


def _mlp(name: str, config: ModelConfig) -> dict[str, Shape]:
    width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    gate = _linear(f"{name}.gate_proj", inner, width, bias=bias) if config.is_gated else {}
    return {
        **gate,
        **_linear(f"{name}.up_proj", inner, width, bias=bias),
        **_linear(f"{name}.down_proj", width, inner, bias=bias),
    }


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


def _gpt2_parts(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    for name, shape in expected_tensors(config).items():
        if name in _GPT2_TOP_NAMES:
            yield name, Part(name=_GPT2_TOP_NAMES[name], shape=shape, start=0, stop=shape[0])
            continue
        _, _, index, inner = name.split(".", 3)
        layer, _, kind = inner.rpartition(".")
        is_fused = layer in _GPT2_FUSED
        stored = "attn.c_attn" if is_fused else _GPT2_NAMES[layer]
        rows = shape[0]
        start = _GPT2_FUSED.get(layer, 0) * rows
        whole = (3 * rows if is_fused else rows, *shape[1:])
        yield (
            name,
            Part(
                name=f"transformer.h.{index}.{stored}.{kind}",
                shape=whole[::-1],
                start=start,
                stop=start + rows,
                is_transposed=len(shape) == 2,
            ),
        )
