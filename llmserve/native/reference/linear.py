"""Products of rows with a weight, in the order that the kernels promise: the bits are the contract.

An output is made alone, input after input or group after group, so it does not know how many rows
and outputs there are. T rows, N outputs, K inputs in G groups; a weight has one scale for each
output and group. U = 2**-24.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array
from .fused import fma
from .quantize import DIGIT_BASE, QuantizedRows, group_slices

__all__ = ["float_linear", "integer_linear", "mixed_linear"]

Integers = npt.NDArray[np.int8]


def float_linear(x: Float32Array, weight: Float32Array) -> Float32Array:
    """x [T, K] times weight [N, K], sum = fma(weight, x, sum) from the first input to the last.

    A bfloat16 weight comes as the float32 that it is. Error against the exact product: at most
    K * U / (1 - K * U) of the sum of the magnitudes.
    """
    total = np.zeros((len(x), len(weight)), np.float32)
    for k in range(x.shape[1]):
        total = fma(weight[None, :, k], x[:, k, None], total)
    return total


def integer_linear(
    x: QuantizedRows, weight: Integers, scales: Float32Array, group_size: int,
    zeros: Integers | None = None,
) -> Float32Array:  # fmt: skip
    """Integer rows times an integer weight [N, K]: exact inside a group, float32 between groups.

    The sums of two digits are joined as fma(high, DIGIT_BASE, low).

    Args:
        x: Rows, with a scale for each group; in the weight's order of inputs.
        weight: The integers, -8..7 or -127..127.
        scales: [N, G].
        group_size: Inputs whose products are summed as integers.
        zeros: [N, G] what is taken off the integers of a group, of their range; None: nothing.

    Error against the exact product of the stored numbers: a product of two scales, sums beyond
    2**24 made float32 and joined, and one addition a group, each U: (G + 4) * U of the sum of the
    magnitudes of the digits' sums.
    """
    total = np.zeros((len(x.scales), len(weight)), np.float32)
    base = np.full(1, DIGIT_BASE, np.float32)
    for index, inputs in enumerate(group_slices(weight.shape[1], group_size)):
        values = _without_zero(weight[:, inputs], zeros, index)
        sums = [
            (digit[:, inputs].astype(np.int64) @ values.T).astype(np.float32) for digit in x.digits
        ]
        joined = sums[0] if len(sums) == 1 else fma(sums[0], base, sums[1])
        total = fma(joined, scales[None, :, index] * x.scales[:, index, None], total)
    return total


def mixed_linear(
    x: Float32Array, weight: Integers, scales: Float32Array, group_size: int,
    zeros: Integers | None = None,
) -> Float32Array:  # fmt: skip
    """float32 rows times an integer weight; arguments as in `integer_linear`.

    Inside a group sum = fma(integer, x, sum), then total = fma(sum, scale, total). Error: at most
    (group_size + G + 1) * U of the sum of the magnitudes.
    """
    total = np.zeros((len(x), len(weight)), np.float32)
    for index, inputs in enumerate(group_slices(weight.shape[1], group_size)):
        values = _without_zero(weight[:, inputs], zeros, index).astype(np.float32)
        part = float_linear(x[:, inputs], values)
        total = fma(part, scales[None, :, index], total)
    return total


def _without_zero(values: Integers, zeros: Integers | None, group: int) -> npt.NDArray[np.int64]:
    wide = values.astype(np.int64)
    return wide if zeros is None else wide - zeros[:, group, None]
