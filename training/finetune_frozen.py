"""Frozen linear layers that stay quantized in memory while LoRA trains beside them.

QLoRA (arXiv 2305.14314, section 3): the weights are kept in nf4 and turned to floats for the moment
of a product, forward and backward; no gradient reaches them. Any quantized layer of a model folder
will do; a folder of floats is quantized to nf4 by bitsandbytes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.layouts import linear_layers
from llmserve.model.transformer import Transformer
from llmserve.quant.bnb import BitsAndBytesFormat, quantize_bitsandbytes, runs_in_kernels
from llmserve.quant.layout import AnyQuantizedLinear

from .lora_weights import JOINED_PROJECTIONS

__all__ = ["FrozenLinear", "freeze_layers", "quantized_layers"]


class FrozenLinear(nn.Module):
    """y = x Wᵀ + b, with W put together from quantized parts at every use."""

    def __init__(self, parts: tuple[AnyQuantizedLinear, ...], bias: Tensor | None) -> None:
        super().__init__()
        self._layers = parts
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def dequantized(self) -> Tensor:
        """W, float32 [out, in]."""
        return torch.from_numpy(np.concatenate([part.dequantize() for part in self._layers]))


class _Product(torch.autograd.Function):
    """A product whose matrix is made again for the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        """x Wᵀ."""
        ctx.layer = layer
        return F.linear(x, layer.dequantized())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient with respect to x alone."""
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized().to(gradient.dtype), None


def quantized_layers(checkpoint: Checkpoint, *, to_nf4: bool) -> dict[str, AnyQuantizedLinear]:
    """Canonical names of the layers that stay quantized, without `.weight`, and their weights.

    Args:
        checkpoint: The model. Layers that are quantized in the folder stay as they are.
        to_nf4: Quantize a folder of floats now. The output layer stays as it is, as do layers
            whose shape bitsandbytes' kernels do not take.

    Raises:
        ConfigError: `to_nf4`, but no layer has a shape that can be quantized.
        MissingDependencyError: bitsandbytes is not installed.
    """
    names = [name for name in linear_layers(checkpoint.config) if name != "lm_head"]
    if checkpoint.quantization is not None or not to_nf4:
        stored = {name: checkpoint.linear(f"{name}.weight") for name in names}
        return {name: value for name, value in stored.items() if not isinstance(value, np.ndarray)}
    form, dtype = BitsAndBytesFormat(kind="nf4"), checkpoint.config.dtype
    layers: dict[str, AnyQuantizedLinear] = {}
    for name in names:
        weight = checkpoint.float32(f"{name}.weight")
        if runs_in_kernels((weight.shape[0], weight.shape[1]), "nf4"):
            layers[name] = quantize_bitsandbytes(weight, form, dtype=dtype, name=name)
    if not layers:
        raise ConfigError(
            "no layer of this model can be kept in nf4, which needs widths of whole 64s in and "
            "whole 32s out; use the method lora"
        )
    return layers


def freeze_layers(model: Transformer, layers: Mapping[str, AnyQuantizedLinear]) -> None:
    """Replace every layer of the model all of whose parts are in `layers` by a frozen one."""
    for path, module in list(model.named_modules()):
        parent, _, own_name = path.rpartition(".")
        if own_name not in JOINED_PROJECTIONS:
            continue
        parts = [f"model.{parent}.{part}" for part in JOINED_PROJECTIONS[own_name]]
        if all(part in layers for part in parts):
            bias = None if module.bias is None else module.bias.detach()
            frozen = FrozenLinear(tuple(layers[part] for part in parts), bias)
            setattr(model.get_submodule(parent), own_name, frozen)
