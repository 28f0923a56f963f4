"""Model folders as programs for GPTQ, AWQ and compressed-tensors write them, of random codes.

Written from the formats' descriptions, one weight at a time and with Python's integers, so that the
product's readers are compared with something else than themselves.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmserve.config import ModelConfig
from llmserve.families import render_config
from llmserve.layouts import linear_layers
from llmserve.quant.dtypes import StoredArray, from_float32
from llmserve.tensor_file import write_tensors
from support.variants import LLAMA, random_tensors

__all__ = ["FOREIGN", "write_foreign_folder"]

Form = Literal["gptq", "gptq-order", "gptq-v2-int8", "awq", "asymmetric", "g_idx", "pack-int8"]
FOREIGN: tuple[Form, ...] = (
    "gptq", "gptq-order", "gptq-v2-int8", "awq", "asymmetric", "g_idx", "pack-int8",
)  # fmt: skip
CONFIG = dataclasses.replace(
    LLAMA, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
SIZE = 16
Tensors = dict[str, StoredArray]


def write_foreign_folder(path: Path, form: Form) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Write the folder; its configuration and what every tensor stands for."""
    config = CONFIG
    weights: dict[str, np.ndarray] = dict(random_tensors(config))
    stored: Tensors = {}
    rng = np.random.default_rng(1)
    for layer in linear_layers(config):
        if layer == "lm_head":
            continue
        out, width = weights[f"{layer}.weight"].shape
        parts, weights[f"{layer}.weight"] = _layer(form, out, width, rng)
        stored |= {f"{layer}.{part}": array for part, array in parts.items()}
    plain = {name for name in weights if name.removesuffix(".weight") not in linear_layers(config)}
    stored |= {name: from_float32(weights[name], "float32") for name in plain}
    path.mkdir()
    values = {**render_config(config), "quantization_config": _configuration(form)}
    (path / "config.json").write_text(json.dumps(values))
    write_tensors(path / "model.safetensors", stored)
    return config, weights


def _configuration(form: Form) -> dict[str, Any]:
    bits = 8 if "int8" in form else 4
    if form.startswith("gptq"):
        return {
            "quant_method": "gptq", "bits": bits, "group_size": SIZE, "sym": False,
            "desc_act": form == "gptq-order",
            "checkpoint_format": "gptq_v2" if "v2" in form else "gptq",
        }  # fmt: skip
    if form == "awq":
        return {
            "quant_method": "awq", "bits": 4, "group_size": SIZE, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": None,
        }  # fmt: skip
    weights = {
        "num_bits": bits, "type": "int", "symmetric": form != "asymmetric", "strategy": "group",
        "group_size": SIZE, "actorder": "group" if form == "g_idx" else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


def _layer(
    form: Form, out: int, width: int, rng: np.random.Generator
) -> tuple[Tensors, np.ndarray]:
    """The stored tensors of one layer, and its weight."""
    bits = 8 if "int8" in form else 4
    middle, groups = 2 ** (bits - 1), width // SIZE
    codes = rng.integers(0, 2 * middle, (out, width))
    zeros = rng.integers(1, 2 * middle, (out, groups))
    if form in ("g_idx", "pack-int8"):
        zeros[:] = middle
    scales = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float32)
    index = np.arange(width) // SIZE
    if form in ("gptq-order", "g_idx"):
        index = rng.permutation(index)
    weight = ((codes - zeros[:, index]) * scales[:, index]).astype(np.float32)
    if form.startswith("gptq"):
        tensors = _gptq(codes, zeros, scales, index, bits, is_first_version="v2" not in form)
    elif form == "awq":
        tensors = _awq(codes, zeros, scales)
    else:
        tensors = _compressed(codes, zeros, scales, bits)
        if form == "asymmetric":
            tensors["weight_zero_point"] = _int32(_words(zeros.T, bits).T)
        if form == "g_idx":
            tensors["weight_g_idx"] = _int32(index)
    return tensors, weight


def _gptq(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray, bits: int,
    *, is_first_version: bool,
) -> Tensors:  # fmt: skip
    return {
        "qweight": _int32(_words(codes, bits).T),
        "qzeros": _int32(_words(zeros.T - int(is_first_version), bits)),
        "scales": from_float32(scales.T, "float32"),
        "g_idx": _int32(index),
    }


def _awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Tensors:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def mixed(table: np.ndarray) -> np.ndarray:  # [rows, outputs], eight outputs to a word
        return table.reshape(len(table), -1, 8)[:, :, order].reshape(len(table), -1)

    return {
        "qweight": _int32(_words(mixed(codes.T), 4)),
        "qzeros": _int32(_words(mixed(zeros.T), 4)),
        "scales": from_float32(scales.T, "float32"),
    }


def _compressed(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int) -> Tensors:
    return {
        "weight_packed": _int32(_words(codes, bits)),
        "weight_scale": from_float32(scales, "float32"),
        "weight_shape": StoredArray("int64", np.array(codes.shape)),
    }


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """[a, b] codes → [a, words], the first lowest; what is left of a last word is 0."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        filled = row + [0] * (-len(row) % per_word)
        groups = [filled[i : i + per_word] for i in range(0, len(filled), per_word)]
        rows.append([sum(code << (bits * i) for i, code in enumerate(group)) for group in groups])
    return np.array(rows, np.uint32)


def _int32(values: np.ndarray) -> StoredArray:
    return StoredArray("int32", np.ascontiguousarray(values).astype(np.uint32).view(np.int32))
