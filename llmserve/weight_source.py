"""What a model is loaded from, as far as a runner needs it: a whole folder, or a part of one."""

from __future__ import annotations

from typing import Protocol

from .config import ModelConfig
from .quant.config import QuantizationConfig
from .quant.dtypes import Float32Array, StoredArray
from .quant.layout import AnyQuantizedLinear

__all__ = ["WeightSource"]


class WeightSource(Protocol):
    """Tensors under canonical names (`layouts.py`); `Checkpoint` is one."""

    @property
    def config(self) -> ModelConfig:
        """The model whose tensors have these shapes."""

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the linear layers are quantized; None where they are not."""

    @property
    def fingerprint(self) -> str:
        """Digest of the whole folder's contents."""

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor `name` is the weight of a quantized layer."""

    def stored(self, name: str) -> StoredArray:
        """The tensor `name` as it is stored."""

    def linear(self, name: str) -> AnyQuantizedLinear | Float32Array:
        """The weight `name` of a linear layer: quantized as it is stored, otherwise float32."""

    def float32(self, name: str) -> Float32Array:
        """The tensor `name` as float32, dequantized if it is quantized."""
