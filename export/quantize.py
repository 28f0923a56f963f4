"""Quantizing a model folder: every linear layer but the head, the rest as it is.

Integers (int8, W8A8, int4; compressed-tensors on disk) are made layer by layer, by rounding to
nearest, or block by block with what a calibration text says of their inputs; nf4, fp4 and bnb-int8
by bitsandbytes. What a layer becomes is decided in `quant_plan.py`; `llmserve.quant` does the
arithmetic, `measure.py` says what it cost and `quant_report.py` writes that down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.layouts import linear_layers
from llmserve.quant.bnb import BitsAndBytesFormat, quantize_bitsandbytes, runs_in_kernels
from llmserve.quant.dtypes import Float32Array, StoredArray, from_float32, to_float32
from llmserve.quant.groups import quantize_to_nearest
from llmserve.quant.layout import AnyQuantizedLinear

from .calibrate import ActivationStream
from .quant_block import QuantizedBlock, check_finite, quantize_block
from .quant_fold import Tensors
from .quant_plan import HEAD, LayerForm, Method, Override, Scheme, plan_layers, rule_of
from .quant_store import BlockStore

__all__ = ["QuantizedModel", "Scheme", "quantize_layers", "quantize_model"]

OnLayer = Callable[[str], None]
Windows = Sequence[Sequence[int]]
_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "w8a8": 8, "int4": 4}
_KINDS: dict[str, Literal["nf4", "fp4", "int8"]] = {"nf4": "nf4", "fp4": "fp4", "bnb-int8": "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A model's linear layers after quantization, and those that stay as they are."""

    scheme: str
    """What was asked for."""
    group_size: int | None
    """The group size asked for; None: one scale per row, or a scheme without a choice."""
    layers: Mapping[str, AnyQuantizedLinear]
    """By name without `.weight`, in the model's order."""
    skipped: tuple[str, ...]
    """Linear layers that stay as they are: by request, or as bitsandbytes does not take them."""
    changed: Mapping[str, StoredArray]
    """Other tensors that are not the original's: norms and biases that took up a scaling."""
    methods: Mapping[str, Method]
    """How each layer's integers were found; nothing for bitsandbytes."""
    method: Method = "rtn"
    """How they were asked to be found."""

    def tensors(self, source: Checkpoint) -> dict[str, StoredArray | AnyQuantizedLinear]:
        """Every tensor of the model by canonical name, as `save_model` takes them."""
        return {
            name: self.layers.get(name.removesuffix(".weight")) or self._plain(source, name)
            for name in source.names()
        }

    def float32(self, source: Checkpoint, name: str) -> Float32Array:
        """A tensor of the quantized model, by canonical name, as it will be executed."""
        layer = self.layers.get(name.removesuffix(".weight"))
        return layer.dequantize() if layer is not None else to_float32(self._plain(source, name))

    def _plain(self, source: Checkpoint, name: str) -> StoredArray:
        return self.changed.get(name) or source.stored(name)


def quantize_model(
    source: Checkpoint, scheme: Scheme, group_size: int | None = None,
    *,
    method: Method = "rtn", is_symmetric: bool = True, overrides: Sequence[Override] = (),
    double_quant: bool = False, windows: Windows = (), store: BlockStore | None = None,
    on_layer: OnLayer = lambda name: None,
) -> QuantizedModel:  # fmt: skip
    """Quantize a model. The same input gives the same output, bit for bit.

    Args:
        source: a model that is not quantized.
        scheme: what its linear layers become.
        group_size: integers: weights that share a scale, None for a whole row. A layer whose width
            it does not divide gets the nearest divisor that keeps the error.
        method: integers: how they are found.
        is_symmetric: integers: without zero points.
        overrides: integers: exceptions for layers.
        double_quant: nf4 and fp4: whether scales are quantized too.
        windows: rows of token ids that the methods other than `rtn` calibrate on.
        store: where finished blocks are kept meanwhile.
        on_layer: called with each layer's name before it is quantized, for progress.

    Raises:
        ConfigError: a model that is quantized already, an impossible group size or combination, or
            (bitsandbytes) a model without a single layer that its kernels take.
        ExportError: a weight that is NaN or infinite; the message names the layer.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if source.quantization is not None:
        raise ConfigError(
            f"{source.path} is quantized already ({source.quantization.scheme}); "
            "give the folder of the original model"
        )
    if scheme in _BITS:
        default = LayerForm(bits=_BITS[scheme], group_size=group_size, is_symmetric=is_symmetric)
        forms = plan_layers(source, default, overrides)
        found = quantize_layers(
            source, forms, method, windows=windows, store=store, on_layer=on_layer
        )
        return replace(found, scheme=scheme, group_size=group_size)
    if group_size is not None:
        raise ConfigError(f"scheme {scheme} has no choice of group size; leave it out")
    if method != "rtn" or overrides or not is_symmetric:
        raise ConfigError(f"scheme {scheme} has no choice of method, zero points or layers")
    form = BitsAndBytesFormat(
        kind=_KINDS[scheme], double_quant=double_quant, compute_dtype=source.config.dtype
    )
    return _quantize_bitsandbytes(source, scheme, form, on_layer)


def quantize_layers(
    source: Checkpoint, forms: Mapping[str, LayerForm], method: Method,
    *,
    windows: Windows = (), store: BlockStore | None = None,
    on_layer: OnLayer = lambda name: None,
) -> QuantizedModel:  # fmt: skip
    """Quantize a model's layers to integers of those forms. Arguments and errors as above."""
    if method == "rtn":
        blocks = [_rounded(source, forms, on_layer)]
    else:
        blocks = _calibrated(source, forms, method, windows, store, on_layer)
    layers = {name: layer for block in blocks for name, layer in block.layers.items()}
    changed = {
        name: from_float32(values, source.config.dtype)
        for block in blocks
        for name, values in block.changed.items()
    }
    return QuantizedModel(
        scheme="mixed",
        group_size=None,
        layers={name: layers[name] for name in forms if name in layers},
        skipped=tuple(name for name, form in forms.items() if form.bits is None),
        changed=changed,
        methods={name: how for block in blocks for name, how in block.methods.items()},
        method=method,
    )


def _rounded(
    source: Checkpoint, forms: Mapping[str, LayerForm], on_layer: OnLayer
) -> QuantizedBlock:
    """Every layer to nearest, which asks for no text."""
    layers = {}
    for name, form in forms.items():
        on_layer(name)
        if form.bits is not None:
            rule = rule_of(form, dtype=source.config.dtype, is_searched=False)
            layers[name] = quantize_to_nearest(source.float32(f"{name}.weight"), rule, name=name)
    methods: dict[str, Method] = dict.fromkeys(layers, "rtn")
    return QuantizedBlock(layers=layers, changed={}, methods=methods)


def _calibrated(
    source: Checkpoint, forms: Mapping[str, LayerForm], method: Method, windows: Windows,
    store: BlockStore | None, on_layer: OnLayer,
) -> list[QuantizedBlock]:  # fmt: skip
    """Block after block, each with the inputs that the quantized ones before it make."""
    if not windows:
        raise ConfigError(f"method {method} needs a text to calibrate on")
    check_finite("model.embed_tokens", source.float32("model.embed_tokens.weight"))
    stream = ActivationStream(source, windows)
    blocks = []
    for index in range(source.config.num_layers):
        prefix = f"model.layers.{index}."
        own = {name: form for name, form in forms.items() if name.startswith(prefix)}
        block = store.read(index) if store is not None else None
        if block is None:
            tensors: Tensors = {
                name: source.float32(name) for name in source.names() if name.startswith(prefix)
            }
            statistics = stream.observe(index)
            block = quantize_block(
                index, tensors, source.config, own, method, statistics, on_layer=on_layer
            )
            if store is not None:
                store.write(index, block)
        else:
            for name in own:
                on_layer(name)
        weights = {f"{name}.weight": layer.dequantize() for name, layer in block.layers.items()}
        stream.advance(index, {**block.changed, **weights})
        blocks.append(block)
    return blocks


def _quantize_bitsandbytes(
    source: Checkpoint, scheme: Scheme, form: BitsAndBytesFormat, on_layer: OnLayer
) -> QuantizedModel:
    layers: dict[str, AnyQuantizedLinear] = {}
    skipped = []
    for name in (name for name in linear_layers(source.config) if name != HEAD):
        on_layer(name)
        weight = source.float32(f"{name}.weight")
        if runs_in_kernels((weight.shape[0], weight.shape[1]), form.kind):
            layers[name] = quantize_bitsandbytes(weight, form, dtype=source.config.dtype, name=name)
        else:
            skipped.append(name)
    if not layers:
        raise ConfigError(
            f"{scheme} takes no layer of this model: bitsandbytes needs output widths that are "
            "multiples of 32 and input widths that are multiples of 64; use int4"
        )
    return QuantizedModel(
        scheme=scheme,
        group_size=None,
        layers=layers,
        skipped=tuple(skipped),
        changed={},
        methods={},
    )
