"""The decoder with its KV cache as one ONNX graph, for prefill and for decoding alike.

Inputs: `input_ids` and `position_ids` [batch, sequence], `attention_mask` [batch, total] (1: a
token, 0: padding on the right; total is at least the tokens of the longest row, past and new) and
for every layer N `past_key_values.N.key` and `.value` [batch, kv_heads, past, head_dim], past 0 at
first. Outputs: `logits` [batch, sequence, vocabulary] and `present.N.key`, `.value`, the pasts of
the next call.

A row's tokens are counted by its mask; those of this call are its last ones. So prompts of
different lengths are padded on the right, and rows of different lengths decode together. A call
with several tokens beside a past has one row. Where past and present are the same memory, longer
than what it holds, the cache is written in place.

A model with a head has no cache and, instead of `logits` over the vocabulary, what its head gives:
`logits` of each text (at its last token) or token, `start_logits` and `end_logits` of a span, or
`last_hidden_state`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.layouts import block_norms
from llmserve.model.layers import sinusoids
from llmserve.quant.dtypes import Float32Array
from llmserve.quant.groups import QuantizedLinear

from .onnx_attention import AttentionParts, cache_names
from .onnx_graph import GraphBuilder
from .onnx_linear import Linears

__all__ = ["build_decoder", "cache_names"]

_KNOWN = frozenset({
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "max_seq_len", "positions", "rope_theta", "rope_scaling",
    "local_rope_theta", "rotary_dim", "sliding_window", "full_attention_layers", "norm",
    "norm_eps", "norm_weight_offset", "norm_placement", "qk_norm", "activation",
    "embedding_scale", "attention_scale", "attention_softcap", "logits_softcap",
    "attention_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings", "head",
    "bos_token_id", "eos_token_ids", "pad_token_id", "dtype",
})  # fmt: skip
"""Fields of `ModelConfig` that the graph honours."""


def build_decoder(
    config: ModelConfig,
    floats: Callable[[str], Float32Array],
    linears: Callable[[str], QuantizedLinear | Float32Array] | None = None,
) -> GraphBuilder:
    """The graph of a model.

    Args:
        config: the model.
        floats: reads a tensor by canonical name, as float32.
        linears: reads the weight of a linear layer, in the numbers that it is to have in the
            graph, and by the name `lm_head.weight` that of the output layer, tied or not; None:
            all are float32.

    Raises `ConfigError` for a model with something that the graph has no part for.
    """
    unknown = config.settings_beyond(_KNOWN)
    if unknown:
        raise ConfigError(
            f"a model with {', '.join(unknown)} cannot be exported to ONNX: serve it as it is"
        )
    graph = GraphBuilder()
    ids = graph.input("input_ids", "int64", ["batch", "sequence"])
    graph.input("attention_mask", "int64", ["batch", "total"])
    if config.positions != "none":
        graph.input("position_ids", "int64", ["batch", "sequence"])
    decoder = _Decoder(graph, config, floats, linears)
    hidden = decoder.embed(ids)
    for index in range(config.num_layers):
        hidden = decoder.layer(hidden, index)
    hidden = decoder.norm(hidden, "model.norm")
    if config.head is None:
        decoder.output_layer(hidden)
    else:
        decoder.head(hidden)
    return graph


class _Decoder:
    """The parts of the graph; each method adds one and returns its output's name."""

    def __init__(
        self,
        graph: GraphBuilder,
        config: ModelConfig,
        floats: Callable[[str], Float32Array],
        linears: Callable[[str], QuantizedLinear | Float32Array] | None,
    ) -> None:
        self.graph = graph
        self.config = config
        self.floats = floats
        self.has_tied_floats = linears is None and config.tie_word_embeddings
        self.linears = Linears(graph, linears or floats, floats)
        self.attention = AttentionParts(graph, config, floats)
        self.attention.add_lengths()

    def weight(self, name: str) -> str:
        return self.graph.weight(name, self.floats(name))

    def embed(self, ids: str) -> str:
        """The embeddings, scaled, with what the positions add to them."""
        graph, scale = self.graph, self.config.embedding_scale
        hidden = graph.node("Gather", [self.weight("model.embed_tokens.weight"), ids], "embedded")
        if scale != 1.0:
            hidden = graph.node("Mul", [hidden, graph.scalar(scale)], "scaled")
        if self.config.positions == "learned":
            table = self.weight("model.embed_positions.weight")
        elif self.config.positions == "sinusoidal":
            table = graph.weight("sinusoids", _sinusoids(self.config))
        else:
            return hidden
        places = graph.node("Gather", [table, "position_ids"], "positions")
        return graph.node("Add", [hidden, places], "positioned")

    def layer(self, hidden: str, index: int) -> str:
        """Attention and feed-forward of one block, each with its norms and its residual."""
        config, name, norms = self.config, f"model.layers.{index}", block_norms(self.config)
        inner = self.optional_norm(hidden, name, norms.before_attention)
        attention = f"{name}.self_attn"
        qkv = self.linears.add(
            inner, [f"{attention}.{part}_proj" for part in "qkv"], f"{attention}.qkv_proj",
            width=config.hidden_size, bias=config.attention_bias,
        )  # fmt: skip
        mixed = self.attention.add(qkv, attention, index)
        out = self.linear(mixed, f"{attention}.o_proj", config.q_size, config.attention_output_bias)
        out = self.optional_norm(out, name, norms.after_attention)
        hidden = self.graph.node("Add", [hidden, out], f"{name}.attended")
        inner = self.optional_norm(hidden, name, norms.before_mlp)
        out = self.optional_norm(self.mlp(inner, f"{name}.mlp"), name, norms.after_mlp)
        return self.graph.node("Add", [hidden, out], f"{name}.out")

    def optional_norm(self, hidden: str, layer: str, name: str | None) -> str:
        return hidden if name is None else self.norm(hidden, f"{layer}.{name}")

    def norm(self, hidden: str, name: str) -> str:
        """RMSNorm, or LayerNorm with its bias."""
        config = self.config
        weight = self.floats(f"{name}.weight") + np.float32(config.norm_weight_offset)
        inputs = [hidden, self.graph.weight(f"{name}.weight", weight)]
        op = "RMSNormalization"
        if config.norm == "layernorm":
            op = "LayerNormalization"
            inputs.append(self.weight(f"{name}.bias"))
        return self.graph.node(op, inputs, f"{name}.out", axis=-1, epsilon=config.norm_eps)

    def linear(self, hidden: str, name: str, width: int, bias: bool) -> str:
        return self.linears.add(hidden, [name], name, width=width, bias=bias)

    def mlp(self, hidden: str, name: str) -> str:
        """A gate of SiLU or GELU, or one inner layer with exact or tanh-approximated GELU."""
        config, graph = self.config, self.graph
        if config.is_gated:
            both = self.linears.add(
                hidden, [f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.gate_up_proj",
                width=config.hidden_size, bias=config.mlp_bias,
            )  # fmt: skip
            names = [f"{name}.gate", f"{name}.up"]
            gate, up = graph.nodes_out("Split", [both], names, axis=-1, num_outputs=2)
            inner = graph.node("Mul", [self.activation(gate, name), up], f"{name}.inner")
        else:
            inner = self.linear(hidden, f"{name}.up_proj", config.hidden_size, config.mlp_bias)
            inner = self.activation(inner, name)
        return self.linear(inner, f"{name}.down_proj", config.intermediate_size, config.mlp_bias)

    def activation(self, values: str, name: str) -> str:
        if self.config.activation == "swiglu":
            sigmoid = self.graph.node("Sigmoid", [values], f"{name}.sigmoid")
            return self.graph.node("Mul", [values, sigmoid], f"{name}.activated")
        approximate = "none" if self.config.activation == "gelu" else "tanh"
        return self.graph.node("Gelu", [values], f"{name}.activated", approximate=approximate)

    def output_layer(self, hidden: str) -> None:
        """`logits`, and the outputs."""
        config, graph = self.config, self.graph
        if self.has_tied_floats:
            table = graph.node("Transpose", ["model.embed_tokens.weight"], "lm_head", perm=[1, 0])
            logits = graph.node("MatMul", [hidden, table], "lm_head.product")
        else:
            logits = self.linear(hidden, "lm_head", config.hidden_size, False)
        if config.logits_softcap is not None:
            cap = graph.scalar(config.logits_softcap)
            logits = graph.node("Tanh", [graph.node("Div", [logits, cap], "uncapped")], "tanh")
            logits = graph.node("Mul", [logits, cap], "capped")
        graph.node("Identity", [logits], "logits")
        graph.output("logits", ["batch", "sequence", config.vocab_size])
        for index in range(config.num_layers):
            for present in cache_names(index)[2:]:
                graph.output(present, self.attention.cache_axes("present"))

    def head(self, hidden: str) -> None:
        """What the model's head gives, as the outputs that programs look for."""
        config, graph = self.config, self.graph
        assert config.head is not None, "a model without a head has an output layer"
        kind, count = config.head.kind, len(config.head.labels)
        if kind == "embedding":
            graph.node("Identity", [hidden], "last_hidden_state")
            graph.output("last_hidden_state", ["batch", "sequence", config.hidden_size])
            return
        name = "qa_outputs" if kind == "span" else "score"
        scores = self.head_scores(hidden, name, has_bias=kind != "sequence")
        if kind == "token":
            graph.node("Identity", [scores], "logits")
            graph.output("logits", ["batch", "sequence", count])
        elif kind == "span":
            parts = graph.nodes_out("Split", [scores], ["start", "end"], axis=-1, num_outputs=2)
            for part in parts:
                graph.node("Squeeze", [part, graph.integers(-1)], f"{part}_logits")
                graph.output(f"{part}_logits", ["batch", "sequence"])
        else:
            last = graph.node("Unsqueeze", ["row_last", graph.integers(-1)], "last_column")
            graph.node("GatherND", [scores, last], "logits", batch_dims=1)
            graph.output("logits", ["batch", count])

    def head_scores(self, hidden: str, name: str, *, has_bias: bool) -> str:
        """Small and decisive, so in float32 in every scheme."""
        matrix = np.ascontiguousarray(self.floats(f"{name}.weight").T)
        product = self.graph.node(
            "MatMul", [hidden, self.graph.weight(f"{name}.weight", matrix)], f"{name}.product"
        )
        if not has_bias:
            return product
        return self.graph.node("Add", [product, self.weight(f"{name}.bias")], f"{name}.out")


def _sinusoids(config: ModelConfig) -> Float32Array:
    """Fixed position vectors [max_seq_len, hidden_size]: sine and cosine by turns."""
    table: Float32Array = sinusoids(torch.arange(config.max_seq_len), config.hidden_size).numpy()
    return table
