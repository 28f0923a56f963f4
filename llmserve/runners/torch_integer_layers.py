"""Linear layers of a GPU's model that keep a quantized folder's integers.

Layers whose integers have one scale for each group or row, and neither zero points nor an
activation order, are taken; of a joined layer (`qkv_proj`, `gate_up_proj`) all parts must be alike.
Every other layer is dequantized at load, as all are on CPUs.

Shapes: N outputs, K inputs; leading axes are free.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..model.layers import Linear
from ..model.transformer import Transformer
from ..model.weights import canonical_parts
from ..quant.groups import QuantizedLinear
from ..quant.packing import pack_int4
from ..weight_source import WeightSource
from .torch_triton_linear import integer_linear

__all__ = ["IntegerLinear", "keep_integers"]


class IntegerLinear(nn.Module):
    """y = x Wᵀ + b, with W [N, K] in integers."""

    integers: Tensor
    scales: Tensor

    def __init__(
        self, parts: list[QuantizedLinear], bias: nn.Parameter | None, device: torch.device
    ) -> None:
        """Put the rows of `parts`, which are alike, one behind the other."""
        super().__init__()
        first = parts[0]
        values = np.concatenate([part.values for part in parts])
        self.num_weights = values.size
        self.group_size = first.group_size or first.shape[1]
        integers = pack_int4(values) if first.bits == 4 else values
        scales = np.concatenate([part.scales for part in parts])
        dtype = getattr(torch, first.scale_dtype)
        self.register_buffer("integers", torch.from_numpy(integers).to(device))
        self.register_buffer("scales", torch.from_numpy(scales).to(device, dtype))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        y = integer_linear(rows, self.integers, self.scales, self.group_size)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def keep_integers(model: Transformer, checkpoint: WeightSource, device: torch.device) -> None:
    """Replace the layers that can be taken; their biases are still to be loaded.

    Raises:
        CheckpointError: a quantized layer is malformed.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not Linear or module is model.lm_head:
            continue  # a gate decides by its own rounding, the output layer is read as a matrix
        parts = canonical_parts(f"{name}.weight", len(module.weight), model.config)
        linears = _alike(checkpoint, [part for part, _ in parts])
        if linears is not None:
            model.set_submodule(name, IntegerLinear(linears, module.bias, device))


def _alike(checkpoint: WeightSource, names: list[str]) -> list[QuantizedLinear] | None:
    """The parts of a layer; None where they cannot be taken together."""
    if not all(checkpoint.is_quantized(name) for name in names):
        return None
    linears: list[QuantizedLinear] = []
    for name in names:
        linear = checkpoint.linear(name)
        if not isinstance(linear, QuantizedLinear) or linear.zeros is not None:
            return None
        if linear.group_of_input is not None:
            return None
        linears.append(linear)
    forms = {(linear.bits, linear.group_size, linear.scale_dtype) for linear in linears}
    return linears if len(forms) == 1 else None
