"""Queries and keys turned to their positions. The bits are the contract.

Source: RoPE, arXiv 2104.09864, in the halves layout of Hugging Face's Llama.
"""

from __future__ import annotations

import numpy as np

from ...quant.dtypes import Float32Array

__all__ = ["rotate"]


def rotate(x: Float32Array, rows: Float32Array) -> Float32Array:
    """Heads [T, H, D] turned by the angles of their tokens.

    `rows` [T, rotary_dim] are cosines, then sines. Number i of the first half turns with number i
    of the second; what is beyond rotary_dim stays. Two products and a sum, each rounded.
    """
    half = rows.shape[1] // 2
    cosines, sines = rows[:, None, :half], rows[:, None, half:]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return np.concatenate([*turned, x[..., 2 * half :]], axis=-1)
