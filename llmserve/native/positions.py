"""Tables of positions: rotary cosines and sines, and sinusoids.

Angles are float32 products as `transformers` makes them; their cosines are made in float64 and
rounded once. Sources: RoPE arXiv 2104.09864; stretches arXiv 2306.15595 (linear) and Llama 3.1;
sinusoids arXiv 1706.03762, section 3.5.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig

__all__ = ["rotary_rows", "sinusoid_rows"]

Floats = npt.NDArray[np.float32]


def rotary_rows(config: ModelConfig, num_positions: int, *, is_local: bool) -> Floats:
    """Cosines, then sines, of every position from 0 on, [num_positions, rotary_size].

    Args:
        config: The model's.
        num_positions: Rows.
        is_local: For layers with the sliding window, where those have a base of their own.
    """
    angles = np.outer(np.arange(num_positions, dtype=np.float32), _frequencies(config, is_local))
    wide = angles.astype(np.float64)
    return np.concatenate([np.cos(wide), np.sin(wide)], axis=1).astype(np.float32)


def sinusoid_rows(num_positions: int, width: int) -> Floats:
    """Sine and cosine by turns, [num_positions, width]."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    slowness = np.float32(10_000.0) ** exponents
    angles = np.arange(num_positions, dtype=np.float32)[:, None] / slowness
    angles = angles.astype(np.float64)
    rows = np.empty((num_positions, width), np.float32)
    rows[:, 0::2], rows[:, 1::2] = np.sin(angles), np.cos(angles)
    return rows


def _frequencies(config: ModelConfig, is_local: bool) -> Floats:
    """Angle per position of each pair, [rotary_size / 2]."""
    theta = config.rope_theta
    if is_local and config.local_rope_theta is not None:
        theta = config.local_rope_theta
    exponents = np.arange(0, config.rotary_size, 2, dtype=np.float32)
    exponents /= np.float32(config.rotary_size)
    frequencies = (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None or is_local:
        return frequencies
    slowed = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slowed
    # llama3: short waves stay, long ones are slowed, those between are blended.
    turns = np.float32(scaling.original_max_seq_len) * frequencies / np.float32(2 * math.pi)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    kept = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
    blended: Floats = (1 - kept) * slowed + kept * frequencies
    return blended
