"""Quantizing a model folder: every linear layer but the head, the rest as it is.

The four schemes: `int8` and `int4` by rounding to nearest in groups (compressed-tensors on disk),
`nf4` and `bnb-int8` by bitsandbytes. What a layer becomes is decided here; `llmserve.quant` does
the arithmetic, `measure.py` says what it cost and `quant_report.py` writes that down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.layouts import expected_tensors, linear_layers
from llmserve.quant.bnb import BitsAndBytesFormat, quantize_bitsandbytes, runs_in_kernels
from llmserve.quant.dtypes import Float32Array, StoredArray, to_float32
from llmserve.quant.group_size import choose_group_size
from llmserve.quant.groups import Bits, quantize_rtn
from llmserve.quant.layout import AnyQuantizedLinear

__all__ = ["QuantizedModel", "Scheme", "quantize_model"]

Scheme = Literal["int8", "int4", "nf4", "bnb-int8"]
_BITS: dict[Scheme, Bits] = {"int8": 8, "int4": 4}
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A model's linear layers after quantization, and those that stay as they are."""

    scheme: Scheme
    """What was asked for."""
    group_size: int | None
    """The group size asked for; None: one scale per row, or a scheme without a choice."""
    layers: Mapping[str, AnyQuantizedLinear]
    """By name without `.weight`, in the model's order."""
    skipped: tuple[str, ...]
    """Linear layers whose shape bitsandbytes' kernels do not take."""

    def tensors(self, source: Checkpoint) -> dict[str, StoredArray | AnyQuantizedLinear]:
        """Every tensor of the model by canonical name, as `save_model` takes them."""
        return {
            name: self.layers.get(name.removesuffix(".weight")) or source.stored(name)
            for name in source.names()
        }

    def float32(self, source: Checkpoint, name: str) -> Float32Array:
        """A tensor of the quantized model, by canonical name, as it will be executed."""
        layer = self.layers.get(name.removesuffix(".weight"))
        return layer.dequantize() if layer is not None else to_float32(source.stored(name))


def quantize_model(
    source: Checkpoint,
    scheme: Scheme,
    group_size: int | None = None,
    *,
    on_layer: Callable[[str], None] = lambda name: None,
) -> QuantizedModel:
    """Quantize a model. The same input gives the same output, bit for bit.

    Args:
        source: a model that is not quantized.
        scheme: what its linear layers become.
        group_size: int8 and int4: weights that share a scale, None for a whole row. A layer
            whose width it does not divide gets the nearest divisor that keeps the error.
        on_layer: called with each layer's name before it is quantized, for progress.

    Raises:
        ConfigError: a model that is quantized already, an impossible group size, or (bitsandbytes)
            a model without a single layer that its kernels take.
        ExportError: a weight that is NaN or infinite; the message names the layer.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if source.quantization is not None:
        raise ConfigError(
            f"{source.path} is quantized already ({source.quantization.scheme}); "
            "give the folder of the original model"
        )
    names = [name for name in linear_layers(source.config) if name != _HEAD]
    if scheme in _BITS:
        sizes = _group_sizes(source, names, _BITS[scheme], group_size)
        layers: dict[str, AnyQuantizedLinear] = {}
        for name in names:
            on_layer(name)
            weight = source.float32(f"{name}.weight")
            layers[name] = quantize_rtn(
                weight,
                _BITS[scheme],
                sizes[weight.shape[1]],
                scale_dtype=source.config.dtype,
                name=name,
            )
        return QuantizedModel(scheme=scheme, group_size=group_size, layers=layers, skipped=())
    if group_size is not None:
        raise ConfigError(f"scheme {scheme} has no choice of group size; leave it out")
    return _quantize_bitsandbytes(source, names, scheme, on_layer)


def _group_sizes(
    source: Checkpoint, names: list[str], bits: Bits, asked: int | None
) -> dict[int, int | None]:
    """Width → group size, None where a group is the whole row."""
    shapes = expected_tensors(source.config)
    widths = {name: shapes[f"{name}.weight"][1] for name in names}
    sizes: dict[int, int | None] = {}
    for width in dict.fromkeys(widths.values()):
        members = [name for name in names if widths[name] == width]
        size = width if asked is None else _choose_size(source, members, width, asked, bits)
        sizes[width] = None if size == width else size
    return sizes


def _choose_size(source: Checkpoint, members: list[str], width: int, asked: int, bits: Bits) -> int:
    def weights() -> Iterator[Float32Array]:
        return (source.float32(f"{name}.weight") for name in members)

    return choose_group_size(width, asked, weights, bits, scale_dtype=source.config.dtype)


def _quantize_bitsandbytes(
    source: Checkpoint, names: list[str], scheme: Scheme, on_layer: Callable[[str], None]
) -> QuantizedModel:
    dtype = source.config.dtype
    kind: Literal["nf4", "int8"] = "nf4" if scheme == "nf4" else "int8"
    form = BitsAndBytesFormat(kind=kind, compute_dtype=dtype)
    layers: dict[str, AnyQuantizedLinear] = {}
    skipped = []
    for name in names:
        on_layer(name)
        weight = source.float32(f"{name}.weight")
        if runs_in_kernels((weight.shape[0], weight.shape[1]), kind):
            layers[name] = quantize_bitsandbytes(weight, form, dtype=dtype, name=name)
        else:
            skipped.append(name)
    if not layers:
        raise ConfigError(
            f"{scheme} takes no layer of this model: bitsandbytes needs output widths that are "
            "multiples of 32 and input widths that are multiples of 64; use int4"
        )
    return QuantizedModel(scheme=scheme, group_size=None, layers=layers, skipped=tuple(skipped))
