"""How much arithmetic training takes, and how much the machine can do.

Operations are counted as PaLM's authors do (arXiv:2204.02311, appendix B): 6 for each weight that a
token is multiplied with, backward pass included, and 12 · layers · width · context for attention;
what is computed again to save memory does not count. MFU is the share of the machine's peak that
goes into them. The peak is measured here, by products of large matrices.
"""

from __future__ import annotations

import time

import torch

from llmserve.config import ModelConfig
from llmserve.layouts import expected_tensors
from llmserve.runners.torch_devices import matrix_rate

from .objective import Precision

__all__ = ["peak_flops", "training_flops_per_token"]

_SIZE = 768
_REPEATS = 4
_ENOUGH_SECONDS = 0.1
"""A product that takes this long is not slow by chance: the type has no fast kernel here."""


def training_flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of the forward and backward pass, for each token of a window."""
    attention = 12 * config.num_layers * config.q_size * config.max_seq_len
    return 6 * _multiplied_weights(config) + attention


def peak_flops(precision: Precision, device: torch.device, *, threads: int) -> float:
    """Operations per second of the fastest product: a GPU's, or one thread's times `threads`."""
    dtype = getattr(torch, precision)
    if device.type == "cuda":
        return 2 * matrix_rate(device, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
        seconds = _seconds(matrix)
        for _ in range(_REPEATS - 1):
            if seconds < _ENOUGH_SECONDS:
                seconds = min(seconds, _seconds(matrix))
    finally:
        torch.set_num_threads(before)
    return 2 * _SIZE**3 / seconds * threads


def _seconds(matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - began


def _multiplied_weights(config: ModelConfig) -> int:
    """Weights that one token is multiplied with; an embedding only looks one row up."""
    total = 0.0
    for name, shape in expected_tensors(config).items():
        is_lookup = "embed_positions" in name or (
            "embed_tokens" in name and not config.tie_word_embeddings
        )
        size = 0.0 if is_lookup or len(shape) < 2 else float(shape[0] * shape[1])
        if ".experts." in name and config.experts is not None:
            size *= config.experts.num_experts_per_token / config.experts.num_experts
        total += size
    return round(total)
