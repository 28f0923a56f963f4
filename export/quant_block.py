"""One block quantized with what is known of its inputs: folding first, then rounding.

AWQ and SmoothQuant scale inputs where that can be folded into what makes them; GPTQ spreads each
input's error over the later ones; `mse` searches scales, weighted by the size of the inputs; `best`
takes GPTQ's or those, layer by layer. A layer to whose input nothing came (an expert that no token
chose) is rounded without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llmserve.config import ModelConfig
from llmserve.errors import ExportError
from llmserve.quant.dtypes import Float32Array
from llmserve.quant.groups import GridRule, QuantizedLinear, quantize_to_nearest

from .awq import awq_scales
from .calibrate import InputStatistics
from .gptq import output_error, quantize_gptq
from .quant_fold import FoldSite, Tensors, fold, fold_sites
from .quant_plan import LayerForm, Method, rule_of
from .smoothquant import smooth_scales

__all__ = ["QuantizedBlock", "check_finite", "quantize_block"]

_SCALES = {"awq": awq_scales, "smoothquant": smooth_scales}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedBlock:
    """What became of a block."""

    layers: Mapping[str, QuantizedLinear]
    """The quantized layers, by name without `.weight`."""
    changed: Tensors
    """Other tensors that changed: norms and biases that took up a division."""
    methods: Mapping[str, Method]
    """How each layer's integers were found."""


def quantize_block(
    index: int, tensors: Tensors, config: ModelConfig, forms: Mapping[str, LayerForm],
    method: Method, statistics: Mapping[str, InputStatistics],
    *, on_layer: Callable[[str], None] = lambda name: None,
) -> QuantizedBlock:  # fmt: skip
    """Quantize block `index`.

    Args:
        index: which.
        tensors: its tensors, float32.
        config: the model's.
        forms: layer → what it becomes.
        method: how; not `rtn`.
        statistics: layer → its inputs.
        on_layer: called with each layer's name before it is rounded.

    Raises:
        ExportError: a tensor that holds NaN or an infinity, by name.
    """
    for name, values in tensors.items():
        check_finite(name, values)
    rules = {
        layer: rule_of(form, dtype=config.dtype, is_searched=method != "smoothquant")
        for layer, form in forms.items()
        if form.bits is not None
    }
    changed: Tensors = {}
    divisors: dict[str, Float32Array] = {}
    for site in fold_sites(config, index):
        scales = _scales(site, {**tensors, **changed}, rules, method, statistics)
        if scales is not None:
            folded, scales = fold({**tensors, **changed}, site, scales, config)
            changed |= folded
            divisors |= dict.fromkeys(site.consumers, scales)
    tensors = {**tensors, **changed}
    layers, methods = {}, {}
    for layer, rule in rules.items():
        on_layer(layer)
        layers[layer], methods[layer] = _rounded(
            layer, tensors[f"{layer}.weight"], rule, method, statistics[layer],
            divisors.get(layer),
        )  # fmt: skip
    others = {
        name: values
        for name, values in changed.items()
        if name.removesuffix(".weight") not in layers
    }
    return QuantizedBlock(layers=layers, changed=others, methods=methods)


def check_finite(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    """Raise `ExportError` for a tensor with NaN or an infinity."""
    if not np.isfinite(values).all():
        raise ExportError(
            f"{name.removesuffix('.weight')} holds NaN or an infinity; it cannot be quantized"
        )


def _rounded(
    layer: str, weight: Float32Array, rule: GridRule, method: Method, inputs: InputStatistics,
    divisors: Float32Array | None,
) -> tuple[QuantizedLinear, Method]:  # fmt: skip
    """One layer and how it was found: of `best` that with the smaller error of the output."""
    importance = inputs.importance
    if importance is not None and divisors is not None:
        importance = np.asarray(importance / np.square(divisors), np.float32)
    if method == "gptq" and inputs.num_rows:
        return quantize_gptq(weight, inputs.gram, rule, name=layer), method
    nearest = quantize_to_nearest(weight, rule, importance=importance, name=layer)
    if method != "best" or not inputs.num_rows:
        return nearest, "mse" if method in ("gptq", "best") else method
    spread = quantize_gptq(weight, inputs.gram, rule, name=layer)
    errors = [output_error(weight, one.dequantize(), inputs.gram) for one in (nearest, spread)]
    return (spread, "gptq") if errors[1] < errors[0] else (nearest, "mse")


def _scales(
    site: FoldSite, tensors: Tensors, rules: Mapping[str, GridRule], method: Method,
    statistics: Mapping[str, InputStatistics],
) -> Float32Array | None:  # fmt: skip
    """What the site's inputs are divided by; None where a layer that would change must not."""
    layers = site.consumers if site.is_norm else (*site.consumers, site.producer)
    if method not in _SCALES or any(layer not in rules for layer in layers):
        return None
    own = {layer: rules[layer] for layer in site.consumers}
    return _SCALES[method](site, tensors, statistics[site.consumers[0]], own)
