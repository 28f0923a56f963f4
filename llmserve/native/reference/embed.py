"""Token ids to the first rows of the residual stream. The bits are the contract."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array, StoredArray, to_float32

__all__ = ["embed"]


def embed(
    token_ids: npt.NDArray[np.int64], table: StoredArray, scale: float,
    positions: npt.NDArray[np.int64], position_table: StoredArray | None,
) -> Float32Array:  # fmt: skip
    """table[id] * scale + position_table[position], [T, width]; each step rounded to float32."""
    rows: Float32Array = to_float32(table)[token_ids] * np.float32(scale)
    if position_table is not None:
        rows += to_float32(position_table)[positions]
    return rows
