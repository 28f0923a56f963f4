"""Activations and the soft cap, in float64, and the bounds of the kernels' error.

Sources: GELU, arXiv 1606.08415; gated units, arXiv 2002.05202; soft caps, arXiv 2408.00118.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..program import Epilogue

__all__ = ["activate", "activation_error", "soft_cap", "soft_cap_error"]

Floats = npt.NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(x: npt.NDArray[np.float32], epilogue: Epilogue) -> Floats:
    """The activation alone, without the product of a gated one."""
    function: Callable[[Floats], Floats] = {
        Epilogue.SWIGLU: _silu,
        Epilogue.GEGLU_TANH: _gelu_tanh,
        Epilogue.GELU: _gelu,
        Epilogue.GELU_TANH: _gelu_tanh,
    }[epilogue]
    return function(x.astype(np.float64))


def activation_error(x: npt.NDArray[np.float32], epilogue: Epilogue) -> Floats:
    """Largest error of the kernels against `activate`, for each number.

    SiLU: 8 * 2**-24 of the result, and 7e-39 of |x|: the exponential ends at e**88. GELU: erf by
    Abramowitz and Stegun 7.1.26 or tanh by the exponential, each within 2e-7 but for the rounding
    of their own terms: 5e-7 of |x|.
    """
    if epilogue is Epilogue.SWIGLU:
        share = 8 * 2.0**-24 * np.abs(activate(x, epilogue))
        return share + 7e-39 * np.abs(x.astype(np.float64))
    return 5e-7 * np.abs(x.astype(np.float64))


def soft_cap(x: npt.NDArray[np.float32], cap: float) -> Floats:
    """cap * tanh(x / cap)."""
    capped: Floats = cap * np.tanh(x.astype(np.float64) / cap)
    return capped


def soft_cap_error(cap: float) -> float:
    """Largest error of the kernels against `soft_cap`: that of tanh, and of its argument."""
    return 4e-7 * cap


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # e**-x beyond float64: the quotient is 0, as it should be
        quotient: Floats = x / (1.0 + np.exp(-x))
    return quotient


def _gelu(x: Floats) -> Floats:
    result: Floats = x * 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
    return result


def _gelu_tanh(x: Floats) -> Floats:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    result: Floats = 0.5 * x * (1.0 + np.tanh(inner))
    return result
