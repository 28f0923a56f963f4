"""The tensors that a model has, under one set of names, and where each family's files keep them.

Canonical names are those of Hugging Face's Llama, and of Gemma, Qwen-MoE where Llama has none;
linear weights are [out, in]. A family's stored tensor holds one canonical tensor or several one
after another (`Part`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from .config import ModelConfig
from .stored_parts import Part, Shape, gpt2_parts, mixtral_parts, phi3_parts, whole

__all__ = [
    "BlockNorms",
    "Family",
    "Part",
    "block_norms",
    "expected_tensors",
    "has_canonical_names",
    "is_ignored",
    "linear_layers",
    "stored_name",
    "stored_parts",
    "written_name",
]

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma2", "gemma3_text", "mixtral",
    "qwen2_moe", "qwen3_moe", "gpt2", "llmserve",
]  # fmt: skip


_HEAD_NAMES = ("lm_head.", "score.", "classifier.", "qa_outputs.")
_BARE_NAMES = {
    "model.": ("embed_tokens.", "layers.", "norm."),
    "transformer.": ("wte.", "wpe.", "h.", "ln_f."),
}
_TRANSFORMER_SPANS = ("llama", "qwen2", "qwen3", "qwen3_moe")


class BlockNorms(NamedTuple):
    """Names of a block's norms by their place; None where there is none.

    One name has two meanings: other programs call the norm before the feed-forward
    `post_attention_layernorm`, unless there is one after attention as well.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


_BLOCK_NORMS = {
    "pre": BlockNorms("input_layernorm", None, "post_attention_layernorm", None),
    "post": BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": BlockNorms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def block_norms(config: ModelConfig) -> BlockNorms:
    """The norms of every block of the model."""
    return _BLOCK_NORMS[config.norm_placement]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name → shape of every tensor that a model of this configuration has."""
    width = config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    if config.positions == "learned":
        shapes["model.embed_positions.weight"] = (config.max_seq_len, width)
    for index in range(config.num_layers):
        shapes |= _block(config, index)
    shapes |= _norm("model.norm", config)
    return shapes | _output(config)


def linear_layers(config: ModelConfig) -> list[str]:
    """Names of the linear layers, without `.weight`: what can be quantized.

    A router of experts, or the gate of a shared one, is none: it decides, and is small.
    """
    names = (name.removesuffix(".weight") for name in expected_tensors(config))
    return [name for name in names if name.endswith(("_proj", "lm_head"))]


def stored_parts(config: ModelConfig, family: Family) -> dict[str, Part]:
    """Canonical name → where the files of `family` hold it."""
    shapes = expected_tensors(config)
    if family == "gpt2":
        return dict(gpt2_parts(shapes))
    if family == "phi3":
        return dict(phi3_parts(shapes))
    if family == "mixtral":
        return dict(mixtral_parts(shapes))
    return {name: whole(name, shape) for name, shape in shapes.items()}


def has_canonical_names(family: Family) -> bool:
    """Whether the family's files hold each tensor by itself, under its canonical name.

    Only then do they say of each linear layer by itself how it is quantized.
    """
    return family not in ("gpt2", "phi3", "mixtral")


def is_ignored(name: str, family: Family) -> bool:
    """Whether a stored tensor is a constant that some programs save and none needs."""
    if family == "gpt2":
        return name.endswith((".attn.bias", ".attn.masked_bias"))
    return family != "llmserve" and name.endswith(".rotary_emb.inv_freq")


def stored_name(name: str, family: Family) -> str:
    """The name that `Part` uses for a tensor called `name` in a file of `family`.

    Files of models without a head of their own leave out the beginning of all other names, as
    GPT-2's have always done; and some classes for spans have GPT-2's.
    """
    beginning = "transformer." if family == "gpt2" else "model."
    if name.startswith((beginning, *_HEAD_NAMES)):
        return name
    if name.startswith("transformer.") and family not in ("gpt2", "llmserve"):
        return beginning + name.removeprefix("transformer.")
    return beginning + name if name.startswith(_BARE_NAMES[beginning]) else name


def written_name(name: str, config: ModelConfig, family: Family) -> str:
    """The name in a file of the tensor that `Part` calls `name`: as transformers looks for it."""
    is_span = config.head is not None and config.head.kind == "span"
    if is_span and family in _TRANSFORMER_SPANS:
        return name.replace("model.", "transformer.", 1) if name.startswith("model.") else name
    return name


def _output(config: ModelConfig) -> dict[str, Shape]:
    head, width = config.head, config.hidden_size
    if head is None:
        tied = config.tie_word_embeddings
        return {} if tied else {"lm_head.weight": (config.vocab_size, width)}
    if head.kind == "embedding":
        return {}
    name = "qa_outputs" if head.kind == "span" else "score"
    return _linear(name, len(head.labels), width, bias=head.kind != "sequence")


def _block(config: ModelConfig, index: int) -> dict[str, Shape]:
    """Tensors in the order of the computation, as far as names are free to have one."""
    layer, norms = f"model.layers.{index}", block_norms(config)
    feed_forward = _experts if config.has_experts(index) else _mlp
    return {
        **_norms(layer, (norms.before_attention,), config),
        **_attention(f"{layer}.self_attn", config),
        **_norms(layer, norms[1:3], config),
        **feed_forward(f"{layer}.mlp", config),
        **_norms(layer, (norms.after_mlp,), config),
    }


def _norms(layer: str, names: Iterable[str | None], config: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name in names:
        if name is not None:
            shapes |= _norm(f"{layer}.{name}", config)
    return shapes


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
        **_qk_norms(name, config),
        **_linear(f"{name}.o_proj", width, config.q_size, bias=config.attention_output_bias),
    }


def _qk_norms(name: str, config: ModelConfig) -> dict[str, Shape]:
    if config.qk_norm == "none":
        return {}
    is_full = config.qk_norm == "full"
    return {
        f"{name}.q_norm.weight": (config.q_size if is_full else config.head_dim,),
        f"{name}.k_norm.weight": (config.kv_size if is_full else config.head_dim,),
    }


def _mlp(name: str, config: ModelConfig, inner: int | None = None) -> dict[str, Shape]:
    width, bias = config.hidden_size, config.mlp_bias
    inner = config.intermediate_size if inner is None else inner
    gate = _linear(f"{name}.gate_proj", inner, width, bias=bias) if config.is_gated else {}
    return {
        **gate,
        **_linear(f"{name}.up_proj", inner, width, bias=bias),
        **_linear(f"{name}.down_proj", width, inner, bias=bias),
    }


def _experts(name: str, config: ModelConfig) -> dict[str, Shape]:
    experts, width = config.experts, config.hidden_size
    assert experts is not None, "a layer with experts in a model without"
    shapes: dict[str, Shape] = {f"{name}.gate.weight": (experts.num_experts, width)}
    for index in range(experts.num_experts):
        shapes |= _mlp(f"{name}.experts.{index}", config, experts.intermediate_size)
    if experts.shared_intermediate_size is not None:
        shapes |= _mlp(f"{name}.shared_expert", config, experts.shared_intermediate_size)
        shapes[f"{name}.shared_expert_gate.weight"] = (1, width)
    return shapes
