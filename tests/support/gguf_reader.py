"""A GGUF file read back and run, in plain Python and numpy: written from the format alone.

Shares nothing with the exporter. `run_llama` is llama.cpp's graph of the architecture `llama`: its
rotary positions turn neighbouring values of a head.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 8: "q8_0", 30: "bf16"}


@dataclass(frozen=True)
class GgufFile:
    """What a file holds."""

    metadata: dict[str, Any]
    types: dict[str, str]
    """Tensor → type."""
    tensors: dict[str, Array]
    """Tensor → its numbers as float32, extents as numpy has them."""


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.take("I"), self.take("Q")
            return [self.value(item) for _ in range(count)]
        return self.take(_SCALARS[kind])


def read_gguf(path: Path) -> GgufFile:
    """Read a whole file; it must be of version 3 and end with its last tensor's padding."""
    cursor = _Cursor(path.read_bytes())
    assert cursor.take("4s") == b"GGUF"
    assert cursor.take("I") == 3
    num_tensors, num_values = cursor.take("QQ")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.take("I"))
    entries = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = [cursor.take("Q") for _ in range(cursor.take("I"))][::-1]
        entries.append((name, shape, _TYPES[cursor.take("I")], cursor.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    tensors, end = {}, start
    for name, shape, kind, offset in entries:
        assert offset % alignment == 0
        assert start + offset >= end, "tensors overlap"
        tensors[name], length = _decode(cursor.data, start + offset, shape, kind)
        end = start + offset + length
    assert -(-end // alignment) * alignment == len(cursor.data)
    return GgufFile(metadata, {name: kind for name, _, kind, _ in entries}, tensors)


def _decode(data: bytes, start: int, shape: list[int], kind: str) -> tuple[Array, int]:
    count = int(np.prod(shape))
    plain = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
    if kind in plain:
        stored = np.frombuffer(data, plain[kind], count, start)
        if kind == "bf16":
            stored = (stored.astype("<u4") << 16).view("<f4")
        return stored.astype(np.float32).reshape(shape), count * np.dtype(plain[kind]).itemsize
    body = 32 if kind == "q8_0" else 16
    blocks = np.frombuffer(data, [("scale", "<f2"), ("body", "u1", body)], count // 32, start)
    if kind == "q8_0":
        integers = blocks["body"].view("i1").astype(np.float32)
    else:
        low, high = blocks["body"] & 15, blocks["body"] >> 4
        integers = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    values = integers * blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(shape), blocks.nbytes


def run_llama(file: GgufFile, ids: list[int]) -> Array:
    """Logits [T, V] of a whole row of ids."""
    x = file.tensors["token_embd.weight"][ids].astype(np.float64)
    for index in range(file.metadata["llama.block_count"]):
        x = x + _attention(file, f"blk.{index}", _norm(file, f"blk.{index}.attn_norm", x))
        h = _norm(file, f"blk.{index}.ffn_norm", x)
        gate = _linear(file, f"blk.{index}.ffn_gate", h)
        up = _linear(file, f"blk.{index}.ffn_up", h)
        x = x + _linear(file, f"blk.{index}.ffn_down", gate / (1 + np.exp(-gate)) * up)
    head = "output" if "output.weight" in file.tensors else "token_embd"
    return _linear(file, head, _norm(file, "output_norm", x)).astype(np.float32)


def _attention(file: GgufFile, layer: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    values = file.metadata
    heads, kv_heads = values["llama.attention.head_count"], values["llama.attention.head_count_kv"]
    dim = values["llama.attention.key_length"]
    tokens = len(x)
    q = _turn(file, _linear(file, f"{layer}.attn_q", x).reshape(tokens, heads, dim))
    k = _turn(file, _linear(file, f"{layer}.attn_k", x).reshape(tokens, kv_heads, dim))
    v = _linear(file, f"{layer}.attn_v", x).reshape(tokens, kv_heads, dim)
    k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(dim)
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", weights, v).reshape(tokens, heads * dim)
    return _linear(file, f"{layer}.attn_output", mixed)


def _turn(file: GgufFile, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rotary positions of [T, heads, D]: values 2i and 2i + 1 are a pair."""
    values, dim = file.metadata, x.shape[-1]
    frequencies = values["llama.rope.freq_base"] ** (-np.arange(0, dim, 2) / dim)
    frequencies = frequencies / values.get("llama.rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in file.tensors:
        frequencies = frequencies / file.tensors["rope_freqs.weight"]
    angles = np.arange(len(x))[:, None, None] * frequencies
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _norm(file: GgufFile, name: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    eps = file.metadata["llama.attention.layer_norm_rms_epsilon"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * file.tensors[f"{name}.weight"]


def _linear(file: GgufFile, name: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    y = x @ file.tensors[f"{name}.weight"].T.astype(np.float64)
    return y + file.tensors.get(f"{name}.bias", np.float32(0))
