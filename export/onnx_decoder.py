"""The decoder with its KV cache as one ONNX graph, for prefill and for decoding alike.

Inputs: `input_ids` and `position_ids` [batch, sequence], `attention_mask` [batch, total] (1: a
token, 0: padding on the left; total = past + sequence) and for every layer N
`past_key_values.N.key` and `.value` [batch, kv_heads, past, head_dim], past 0 at first. Outputs:
`logits` [batch, sequence, vocabulary] and `present.N.key`, `.value`, the pasts of the next call.
Everything is float32 or int64; batch, sequence and past vary freely.

Standard operators only. Attention gets an explicit mask, because operator sets disagree on how
`is_causal` lines up with a past. A padded token attends to itself, so that no row of the softmax
is empty; nothing else attends to it. Layers with a sliding window have a mask of their own; a row's
padding moves its queries and keys alike, so that their distance stays. Source of the operators:
ONNX 1.18, operator set 23.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from onnx import TensorProto

from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.model.layers import rotary_frequencies
from llmserve.quant.dtypes import Float32Array

from .onnx_graph import Axes, GraphBuilder

__all__ = ["build_decoder", "cache_names"]

ReadTensor = Callable[[str], Float32Array]
"""Canonical name → values."""


_KNOWN = frozenset({
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "max_seq_len", "positions", "rope_theta", "rope_scaling",
    "sliding_window", "full_attention_layers", "norm", "norm_eps", "activation",
    "attention_scale", "attention_bias", "attention_output_bias", "mlp_bias",
    "tie_word_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id", "dtype",
})  # fmt: skip
"""Fields of `ModelConfig` that the graph honours."""


def build_decoder(config: ModelConfig, read: ReadTensor) -> GraphBuilder:
    """The graph of a model whose tensors `read` gives by canonical name.

    Raises `ConfigError` for a model with something that the graph has no part for.
    """
    _check(config)
    graph = GraphBuilder()
    ids = graph.input("input_ids", "int64", ["batch", "sequence"])
    graph.input("attention_mask", "int64", ["batch", "total"])
    graph.input("position_ids", "int64", ["batch", "sequence"])
    decoder = _Decoder(graph, config, read)
    hidden = graph.node("Gather", [decoder.weight("model.embed_tokens.weight"), ids], "embedded")
    hidden = decoder.with_positions(hidden)
    decoder.add_masks()
    for index in range(config.num_layers):
        hidden = decoder.layer(hidden, index)
    hidden = decoder.norm(hidden, "model.norm")
    decoder.head(hidden)
    return graph


def _check(config: ModelConfig) -> None:
    unknown = config.settings_beyond(_KNOWN)
    if config.activation == "geglu_tanh":
        unknown.append("activation")
    if unknown:
        raise ConfigError(
            f"a model with {', '.join(unknown)} other than Llama's cannot be exported to ONNX"
        )


def cache_names(layer_index: int) -> tuple[str, str, str, str]:
    """Names of a layer's past key and value and of its present key and value."""
    past, present = f"past_key_values.{layer_index}", f"present.{layer_index}"
    return f"{past}.key", f"{past}.value", f"{present}.key", f"{present}.value"


class _Decoder:
    """The parts of the graph; each method adds one and returns its output's name."""

    def __init__(self, graph: GraphBuilder, config: ModelConfig, read: ReadTensor) -> None:
        self.graph = graph
        self.config = config
        self.read = read

    def weight(self, name: str) -> str:
        return self.graph.weight(name, self.read(name))

    def with_positions(self, hidden: str) -> str:
        """Add what the positions add to the embeddings; for RoPE, compute its angles."""
        kind, graph = self.config.positions, self.graph
        if kind == "learned":
            table = self.weight("model.embed_positions.weight")
            place = graph.node("Gather", [table, "position_ids"], "positions")
            return graph.node("Add", [hidden, place], "positioned")
        if kind == "sinusoidal":
            return graph.node("Add", [hidden, self._sinusoids()], "positioned")
        if kind == "rope":
            frequencies = rotary_frequencies(self.config).numpy()
            angles = graph.weight("frequencies", frequencies)
            angles = graph.node("Mul", [self._position_column(), angles], "angles")
            graph.node("Cos", [angles], "cos")
            graph.node("Sin", [angles], "sin")
        return hidden

    def _position_column(self) -> str:
        """The positions as float32 [batch, sequence, 1]."""
        graph = self.graph
        places = graph.node("Cast", ["position_ids"], "positions_float", to=TensorProto.FLOAT)
        return graph.node("Unsqueeze", [places, graph.integers(-1)], "position_column")

    def _sinusoids(self) -> str:
        """Sine and cosine by turns, [batch, sequence, hidden_size]."""
        graph, width = self.graph, self.config.hidden_size
        divisors = graph.weight("divisors", _sinusoid_divisors(width))
        angles = graph.node("Div", [self._position_column(), divisors], "angles")
        pairs = [
            graph.node(
                "Unsqueeze", [graph.node(op, [angles], op.lower()), graph.integers(-1)], f"{op}_1"
            )
            for op in ("Sin", "Cos")
        ]
        stacked = graph.node("Concat", pairs, "sin_cos", axis=-1)
        return graph.node("Reshape", [stacked, graph.integers(0, 0, width)], "positions")

    def add_masks(self) -> None:
        """`mask` [batch, 1, sequence, total]: which tokens each token attends to.

        Where the model has a sliding window, `window_mask` is the same within it.
        """
        graph = self.graph
        zero, one = graph.weight("zero", np.array(0)), graph.weight("one", np.array(1))
        total = graph.node("Shape", ["attention_mask"], "total", start=1, end=2)
        length = graph.node("Shape", ["input_ids"], "sequence", start=1, end=2)
        total = graph.node("Squeeze", [total], "total_scalar")
        length = graph.node("Squeeze", [length], "sequence_scalar")
        past = graph.node("Sub", [total, length], "past")
        keys = graph.node("Range", [zero, total, one], "key_index")
        queries = graph.node("Range", [past, total, one], "query_index")
        queries = graph.node("Unsqueeze", [queries, graph.integers(1)], "query_column")
        causal = graph.node("LessOrEqual", [keys, queries], "causal")
        itself = graph.node("Equal", [keys, queries], "itself")
        tokens = graph.node("Cast", ["attention_mask"], "is_token", to=TensorProto.BOOL)
        tokens = graph.node("Unsqueeze", [tokens, graph.integers(1, 2)], "is_token_row")
        seen = graph.node("And", [causal, tokens], "seen")
        graph.node("Or", [seen, itself], "mask")
        if self.config.sliding_window is not None:
            window = graph.weight("window", np.array(self.config.sliding_window))
            first = graph.node("Sub", [queries, window], "before_window")
            near = graph.node("Greater", [keys, first], "near")
            graph.node("And", ["mask", near], "window_mask")

    def layer(self, hidden: str, index: int) -> str:
        """Attention and feed-forward of one block, each with its norm and its residual."""
        name = f"model.layers.{index}"
        normed = self.norm(hidden, f"{name}.input_layernorm")
        mixed = self.attention(normed, f"{name}.self_attn", index)
        hidden = self.graph.node("Add", [hidden, mixed], f"{name}.attended")
        normed = self.norm(hidden, f"{name}.post_attention_layernorm")
        return self.graph.node("Add", [hidden, self.mlp(normed, f"{name}.mlp")], f"{name}.out")

    def norm(self, hidden: str, name: str) -> str:
        """RMSNorm, or LayerNorm with its bias."""
        inputs = [hidden, self.weight(f"{name}.weight")]
        op = "RMSNormalization"
        if self.config.norm == "layernorm":
            op = "LayerNormalization"
            inputs.append(self.weight(f"{name}.bias"))
        return self.graph.node(op, inputs, f"{name}.out", axis=-1, epsilon=self.config.norm_eps)

    def linear(self, hidden: str, name: str, *, bias: bool) -> str:
        """hidden [..., in] times the weight, kept as [in, out], plus the bias."""
        weight = np.ascontiguousarray(self.read(f"{name}.weight").T)
        weight_name = self.graph.weight(f"{name}.weight", weight)
        out = self.graph.node("MatMul", [hidden, weight_name], f"{name}.product")
        if not bias:
            return out
        return self.graph.node("Add", [out, self.weight(f"{name}.bias")], f"{name}.out")

    def attention(self, hidden: str, name: str, index: int) -> str:
        """Attention over the cache and the new tokens, with fewer key heads where the model has."""
        config, graph = self.config, self.graph
        bias = config.attention_bias
        query, key, value = (
            self.linear(hidden, f"{name}.{part}_proj", bias=bias) for part in ("q", "k", "v")
        )
        if config.positions == "rope":
            query = self._rotate(query, f"{name}.query", config.num_heads)
            key = self._rotate(key, f"{name}.key", config.num_kv_heads)
        past_key, past_value, present_key, present_value = cache_names(index)
        cache_axes: Axes = ["batch", config.num_kv_heads, "past", config.head_dim]
        mask = "mask" if config.window_of(index) is None else "window_mask"
        inputs = [query, key, value, mask]
        inputs += [graph.input(past, "float32", cache_axes) for past in (past_key, past_value)]
        mixed, *_ = graph.nodes_out(
            "Attention",
            inputs,
            [f"{name}.mixed", present_key, present_value],
            q_num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.score_scale,
        )
        return self.linear(mixed, f"{name}.o_proj", bias=config.attention_output_bias)

    def _rotate(self, values: str, name: str, heads: int) -> str:
        inputs = [values, "cos", "sin"]
        return self.graph.node("RotaryEmbedding", inputs, f"{name}.rotated", num_heads=heads)

    def mlp(self, hidden: str, name: str) -> str:
        """Gated SiLU, or one inner layer with exact or tanh-approximated GELU."""
        config, graph = self.config, self.graph
        inner = self.linear(hidden, f"{name}.up_proj", bias=config.mlp_bias)
        if config.is_gated:
            gate = self.linear(hidden, f"{name}.gate_proj", bias=config.mlp_bias)
            sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
            gate = graph.node("Mul", [gate, sigmoid], f"{name}.gate")
            inner = graph.node("Mul", [gate, inner], f"{name}.inner")
        else:
            approximate = "tanh" if config.activation == "gelu_tanh" else "none"
            inner = graph.node("Gelu", [inner], f"{name}.inner", approximate=approximate)
        return self.linear(inner, f"{name}.down_proj", bias=config.mlp_bias)

    def head(self, hidden: str) -> None:
        """`logits`, from the transposed embedding where it is shared, and the outputs."""
        config, graph = self.config, self.graph
        if config.tie_word_embeddings:
            perm = [1, 0]
            head = graph.node("Transpose", ["model.embed_tokens.weight"], "lm_head", perm=perm)
            graph.node("MatMul", [hidden, head], "logits")
        else:
            weight = np.ascontiguousarray(self.read("lm_head.weight").T)
            graph.node("MatMul", [hidden, graph.weight("lm_head.weight", weight)], "logits")
        graph.output("logits", ["batch", "sequence", config.vocab_size])
        axes: Axes = ["batch", config.num_kv_heads, "total", config.head_dim]
        for index in range(config.num_layers):
            for present in cache_names(index)[2:]:
                graph.output(present, axes)


def _sinusoid_divisors(width: int) -> Float32Array:
    """Position / divisor is the angle of each pair, as in `llmserve.model.layers.sinusoids`."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    divisors: Float32Array = (10_000.0**exponents).numpy()
    return divisors
