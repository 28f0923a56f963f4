"""Attention of an exported graph: norms of queries and keys, rotary positions, the cache.

All of it but the norms is one operator of ONNX Runtime, GroupQueryAttention: it takes rows of
different lengths in one batch and, where a caller gives the same memory as past and present, writes
new keys and values in place. Plain Attention copies the whole cache in every step. It wants heads
of a multiple of 8 values: others are filled up with zeros, which change no product. It turns
queries and keys itself where what is turned of a head is a multiple of 16 values; elsewhere the
standard's RotaryEmbedding does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from llmserve.config import ModelConfig
from llmserve.model.layers import rotary_frequencies
from llmserve.quant.dtypes import Float32Array

from .onnx_graph import CONTRIB, INT32, GraphBuilder

__all__ = ["AttentionParts", "cache_head_dim", "cache_names"]


def cache_names(layer_index: int) -> tuple[str, str, str, str]:
    """Names of a layer's past key and value and of its present key and value."""
    past, present = f"past_key_values.{layer_index}", f"present.{layer_index}"
    return f"{past}.key", f"{past}.value", f"{present}.key", f"{present}.value"


def cache_head_dim(config: ModelConfig) -> int:
    """Values of a head in the cache, zeros that fill it up included."""
    return -(-config.head_dim // 8) * 8


class AttentionParts:
    """Adds the attention of each layer to a graph."""

    def __init__(
        self, graph: GraphBuilder, config: ModelConfig, floats: Callable[[str], Float32Array]
    ) -> None:
        """`floats` reads a tensor by its canonical name."""
        self._graph, self._config, self._floats = graph, config, floats
        self._width = cache_head_dim(config)
        has_rope = config.positions == "rope"
        self._rotates_within = has_rope and config.rotary_size % 16 == 0
        self._rotates_before = has_rope and not self._rotates_within
        self._takes_packed = (
            config.qk_norm == "none" and self._width == config.head_dim and not self._rotates_before
        )

    def add_lengths(self) -> None:
        """From the mask to what the operator asks for: tokens of each row, and the most of all."""
        graph = self._graph
        total = graph.node("ReduceSum", ["attention_mask", graph.integers(1)], "row_tokens",
                           keepdims=0)  # fmt: skip
        last = graph.node("Sub", [total, graph.scalar(1)], "row_last")
        graph.node("Cast", [last], "seqlens_k", to=INT32)
        most = graph.node("Shape", ["attention_mask"], "mask_length", start=1, end=2)
        most = graph.node("Squeeze", [most], "mask_length_scalar")
        graph.node("Cast", [most], "total_sequence_length", to=INT32)

    def add(self, qkv: str, name: str, index: int) -> str:
        """Mix values by queries and keys: `qkv` [batch, sequence, (H + 2 KV) D], packed, becomes
        [batch, sequence, H D]."""
        config, graph = self._config, self._graph
        inputs = [qkv, "", ""] if self._takes_packed else self._split(qkv, name, index)
        past_key, past_value, present_key, present_value = cache_names(index)
        pasts = [past_key, past_value]
        if config.head is None:
            for past in pasts:
                graph.input(past, "float32", self.cache_axes("past"))
        else:
            pasts = ["", ""]
        inputs += [*pasts, "seqlens_k", "total_sequence_length"]
        if self._rotates_within:
            inputs += [*self._rotary_tables(index), "position_ids"]
        mixed, *_ = graph.nodes_out(
            "GroupQueryAttention",
            inputs,
            [f"{name}.mixed", present_key, present_value],
            domain=CONTRIB,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.score_scale,
            local_window_size=config.window_of(index) or -1,
            softcap=config.attention_softcap or 0.0,
            do_rotary=int(self._rotates_within),
        )
        return self._unfilled(mixed, f"{name}.mixed")

    def cache_axes(self, length: str) -> list[int | str]:
        """Axes of a layer's keys, or values, of so many tokens."""
        return ["batch", self._config.num_kv_heads, length, self._width]

    def _rotary_tables(self, index: int) -> list[str]:
        """Cosines and sines of every position, [max_seq_len, R / 2] each."""
        is_local = self._config.has_local_rope(index)
        names = ["local_cos", "local_sin"] if is_local else ["cos", "sin"]
        if names[0] not in self._graph.weights:
            places = torch.arange(self._config.max_seq_len, dtype=torch.float32)
            angles = places[:, None] * rotary_frequencies(self._config, is_local=is_local)
            self._graph.weight(names[0], angles.cos().numpy())
            self._graph.weight(names[1], angles.sin().numpy())
        return names

    def _split(self, qkv: str, name: str, index: int) -> list[str]:
        """Queries, keys and values by themselves, normalized, turned and filled up."""
        config, graph = self._config, self._graph
        sizes = graph.integers(config.q_size, config.kv_size, config.kv_size)
        names = [f"{name}.{part}" for part in ("q", "k", "v")]
        query, key, value = graph.nodes_out("Split", [qkv, sizes], names, axis=-1)
        if config.qk_norm != "none":
            query = self._normalized(query, f"{name}.q_norm")
            key = self._normalized(key, f"{name}.k_norm")
        if self._rotates_before:
            query = self._rotated(query, index, config.num_heads)
            key = self._rotated(key, index, config.num_kv_heads)
        return [self._filled(part) for part in (query, key, value)]

    def _rotated(self, heads: str, index: int, count: int) -> str:
        return self._graph.node(
            "RotaryEmbedding", [heads, *self._rotary_tables(index), "position_ids"],
            f"{heads}.rotated", num_heads=count, rotary_embedding_dim=self._config.rotary_dim or 0,
        )  # fmt: skip

    def _normalized(self, heads: str, name: str) -> str:
        """RMSNorm of each head, or of all heads together where the weight is as wide."""
        config, graph = self._config, self._graph
        weight = self._floats(f"{name}.weight") + np.float32(config.norm_weight_offset)
        is_full = config.qk_norm == "full"
        if not is_full:
            heads = graph.node("Reshape", [heads, self._by_head(config.head_dim)], f"{name}.heads")
        normed = graph.node(
            "RMSNormalization", [heads, graph.weight(f"{name}.weight", weight)], f"{name}.normed",
            axis=-1, epsilon=config.norm_eps,
        )  # fmt: skip
        if is_full:
            return normed
        return graph.node("Reshape", [normed, graph.integers(0, 0, -1)], f"{name}.flat")

    def _by_head(self, width: int) -> str:
        return self._graph.integers(0, 0, -1, width)

    def _filled(self, heads: str) -> str:
        """Every head with zeros behind it, up to the width of the cache."""
        graph, missing = self._graph, self._width - self._config.head_dim
        if not missing:
            return heads
        parts = graph.node(
            "Reshape", [heads, self._by_head(self._config.head_dim)], f"{heads}.heads"
        )
        pads = graph.integers(0, 0, 0, 0, 0, 0, 0, missing)
        parts = graph.node("Pad", [parts, pads], f"{heads}.filled")
        return graph.node("Reshape", [parts, graph.integers(0, 0, -1)], f"{heads}.wide")

    def _unfilled(self, heads: str, name: str) -> str:
        graph, head_dim = self._graph, self._config.head_dim
        if self._width == head_dim:
            return heads
        parts = graph.node("Reshape", [heads, self._by_head(self._width)], f"{name}.heads")
        bounds = [graph.integers(0), graph.integers(head_dim), graph.integers(3)]
        parts = graph.node("Slice", [parts, *bounds], f"{name}.sliced")
        return graph.node("Reshape", [parts, graph.integers(0, 0, -1)], f"{name}.narrow")
