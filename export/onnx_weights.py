"""What the linear layers of a model are in its exported graph, layer by layer.

A model that is not quantized is rounded to nearest as the scheme says. A quantized one keeps its
own integers, scales and zero points; a form that the graph has no product for (bitsandbytes'
types, groups that no power of two from 16 on divides, an activation order) becomes float32, and is
named. With integers anywhere, the output layer is int8, with one scale for each output, as on the
native runner; the embedding stays float32.
"""

from __future__ import annotations

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.layouts import linear_layers
from llmserve.quant.dtypes import Float32Array
from llmserve.quant.groups import QuantizedLinear

from .onnx_linear import Scheme, block_size_of, in_scheme

__all__ = ["GraphWeights"]

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


class GraphWeights:
    """The weights of an open folder as a graph takes them."""

    def __init__(self, source: Checkpoint, scheme: Scheme | None) -> None:
        """Raises `ConfigError` for a quantized folder and a scheme that is not its own."""
        stored = source.quantization.scheme if source.quantization else None
        if stored is not None and scheme not in (None, "fp32", stored):
            raise ConfigError(
                f"{source.path} is quantized already ({stored}); leave out --scheme to keep its "
                "integers, or say --scheme fp32"
            )
        self._source = source
        self.scheme: str = scheme or stored or "fp32"
        """Name of the numbers."""
        self.is_exact = self.scheme == "fp32"
        """Whether everything is float32."""
        self._rounds: Scheme = scheme or "fp32"
        self.float_layers: list[str] = []
        """Quantized layers that became float32, in the order they were read."""

    @property
    def form(self) -> str:
        """What the graph computes with, for people."""
        if self.is_exact:
            return "float32"
        return f"{self.scheme} weights, int8 activations, int8 head"

    def linear(self, name: str) -> QuantizedLinear | Float32Array:
        """The weight of a linear layer; `lm_head.weight` of a tied model, too.

        Raises `ExportError` for NaN or an infinity that would have to be rounded.
        """
        source = self._source
        if name == _HEAD:
            stored = _EMBEDDING if source.config.tie_word_embeddings else _HEAD
            return in_scheme(source.float32(stored), "int8", name)
        if not source.is_quantized(name):
            return in_scheme(source.float32(name), self._rounds, name)
        weight = source.linear(name)
        if not isinstance(weight, QuantizedLinear) or block_size_of(weight) is None:
            return self._as_float(name)
        return weight

    def float32(self, name: str) -> Float32Array:
        """The tensor `name` with the values that the graph has, [out, in] for a linear layer."""
        config = self._source.config
        if self.is_exact or name.removesuffix(".weight") not in linear_layers(config):
            return self._source.float32(name)
        weight = self.linear(name)
        if not isinstance(weight, QuantizedLinear):
            return weight
        width = self._source.shape_of(name)[1]
        return weight.dequantize()[:, :width]

    def _as_float(self, name: str) -> Float32Array:
        if name not in self.float_layers:
            self.float_layers.append(name)
        return self._source.float32(name)
