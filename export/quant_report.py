"""The report of a quantization: what each layer became, and what the model lost.

`quantization_report.json` in the quantized folder holds all of it; the table on the terminal
(`quant_table.py`) is made from the same object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmserve.checkpoint import Checkpoint
from llmserve.families import family_of
from llmserve.layouts import has_canonical_names
from llmserve.quant.groups import QuantizedLinear
from llmserve.quant.layout import AnyQuantizedLinear, encode_layer

from .measure import Comparison
from .quantize import QuantizedModel

__all__ = ["REPORT_FILE", "LayerReport", "QuantizationReport", "make_report"]

REPORT_FILE = "quantization_report.json"

_INT_BOUND = (
    "per weight: |original - (integer - zero) * scale| <= |scale| / 2, scale being the stored one "
    "of its group; the float32 product adds at most 2**-24 of itself"
)
_CALIBRATED_BOUND = "none stated: the method trades single weights' errors; max_error is observed"
_BNB_BOUND = "none stated: the rounding is bitsandbytes' own; max_error is what was observed"

# vLLM's Marlin kernels; a whole row (no group) is always taken.
_COMMON_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One quantized layer."""

    name: str
    """Its name, without `.weight`."""
    shape: tuple[int, int]
    """Output and input width."""
    form: str
    """int8, int4, nf4, fp4 or bnb-int8."""
    group_size: int | None
    """Weights that share a scale; None: one scale per output row."""
    has_zeros: bool
    """Whether groups have zero points."""
    method: str
    """How its integers were found."""
    bits_per_weight: float
    """Bits on disk, scales and shape included, divided by the number of weights."""
    max_error: float
    """Largest absolute error of a weight."""
    relative_error: float
    """Root of the squared error's sum, relative to the weights'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """One quantized model beside its original."""

    scheme: str
    method: str
    """rtn, mse, gptq, awq, smoothquant, or bitsandbytes' own."""
    asked_group_size: int | None
    source_fingerprint: str
    """sha256 that names the original folder's content."""
    bytes_before: int
    """All tensors of the original on disk."""
    bytes_after: int
    """All tensors of the quantized model on disk."""
    layers: tuple[LayerReport, ...]
    left_as_they_are: tuple[str, ...]
    """Linear layers that stayed, by request or as bitsandbytes' kernels do not take them; the head
    is never quantized."""
    rescaled: tuple[str, ...]
    """Norms and biases that took up a scaling of the layers' inputs."""
    error_bound: str
    comparison: Comparison | None
    """None if it was not measured."""
    cache_comparison: Comparison | None
    """The same with an int8 KV cache, where the folder asks for one."""
    text_sha256: str | None
    """Of the evaluation text, as read."""
    calibration_sha256: str | None
    """Of the calibration text, where one was read."""
    notes: tuple[str, ...]
    """What users of other programs should know."""

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers together, scales included."""
        weights = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        bits = [layer.bits_per_weight for layer in self.layers]
        return sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)

    def as_json(self) -> dict[str, Any]:
        """The report as `quantization_report.json` holds it."""
        values = asdict(self)
        values["bits_per_weight"] = self.bits_per_weight
        for name in ("comparison", "cache_comparison"):
            found: Comparison | None = getattr(self, name)
            if found is not None:
                values[name]["perplexity_before"] = found.perplexity_before
                values[name]["perplexity_after"] = found.perplexity_after
        return values


def make_report(
    source: Checkpoint,
    model: QuantizedModel,
    *,
    comparison: Comparison | None,
    cache_comparison: Comparison | None = None,
    text_sha256: str | None,
    calibration_sha256: str | None = None,
) -> QuantizationReport:
    """Describe a quantized model; every weight is compared with its original."""
    layers = tuple(
        _layer_report(name, linear, model.methods.get(name), source.float32(f"{name}.weight"))
        for name, linear in model.layers.items()
    )
    unchanged = sum(
        source.stored(name).nbytes
        for name in source.names()
        if name.removesuffix(".weight") not in model.layers
    )
    is_integer = any(isinstance(layer, QuantizedLinear) for layer in model.layers.values())
    bound = _INT_BOUND if model.method == "rtn" else _CALIBRATED_BOUND
    return QuantizationReport(
        scheme=model.scheme,
        method=model.method if is_integer else "bitsandbytes",
        asked_group_size=model.group_size,
        source_fingerprint=source.fingerprint,
        bytes_before=source.stored_bytes(),
        bytes_after=unchanged + sum(_stored_bytes(linear) for linear in model.layers.values()),
        layers=layers,
        left_as_they_are=model.skipped,
        rescaled=tuple(model.changed),
        error_bound=bound if is_integer else _BNB_BOUND,
        comparison=comparison,
        cache_comparison=cache_comparison,
        text_sha256=text_sha256,
        calibration_sha256=calibration_sha256,
        notes=tuple(_notes(source, layers, model.scheme)),
    )


def _stored_bytes(linear: AnyQuantizedLinear) -> int:
    return sum(array.nbytes for array in encode_layer("", linear).values())


def _layer_report(
    name: str,
    linear: AnyQuantizedLinear,
    method: str | None,
    original: np.ndarray[Any, Any],
) -> LayerReport:
    error = (linear.dequantize() - original).astype(np.float64)
    norm = float(np.linalg.norm(original.astype(np.float64)))
    form, group_size, has_zeros = _form_of(linear)
    return LayerReport(
        name=name,
        shape=linear.shape,
        form=form,
        group_size=group_size,
        has_zeros=has_zeros,
        method=method or "bitsandbytes",
        bits_per_weight=8 * _stored_bytes(linear) / (linear.shape[0] * linear.shape[1]),
        max_error=float(np.abs(error).max()),
        relative_error=float(np.linalg.norm(error)) / norm if norm else 0.0,
    )


def _form_of(linear: AnyQuantizedLinear) -> tuple[str, int | None, bool]:
    """Name, group size, and whether there are zero points."""
    if isinstance(linear, QuantizedLinear):
        return f"int{linear.bits}", linear.group_size, linear.zeros is not None
    is_int8 = linear.form.kind == "int8"
    return "bnb-int8" if is_int8 else linear.form.kind, None if is_int8 else 64, False


def _notes(source: Checkpoint, layers: tuple[LayerReport, ...], scheme: str) -> Iterator[str]:
    family = family_of(source.config)
    if family == "llmserve" or not has_canonical_names(family):
        yield f"a model of the family {family}: llmserve alone opens its quantized form"
        return
    if source.config.experts is not None:
        yield "transformers does not open quantized experts; other programs may"
        return
    forms = {layer.form for layer in layers}
    if scheme == "w8a8":
        yield (
            "transformers, vLLM and SGLang read this form; transformers rounds activations to int8 "
            "with one scale for each token, the native runner to 15 bits"
        )
    elif forms == {"int8"}:
        yield (
            "transformers reads this form; vLLM and SGLang take int8 weights in it only together "
            "with int8 activations, and may refuse it: --scheme w8a8 writes those"
        )
    elif forms == {"int4", "int8"}:
        yield "transformers reads a folder of two widths of integers; other programs may refuse it"
    elif forms != {"int4"}:
        yield "transformers reads this form, with bitsandbytes and accelerate installed"
    layouts = {(layer.form, layer.group_size, layer.has_zeros) for layer in layers}
    if len(layouts) > 1 and any(form == "int4" and has_zeros for form, _, has_zeros in layouts):
        yield (
            "int4 zero points in layers of several group sizes or forms: vLLM and SGLang read "
            "them; transformers (5.23 with compressed-tensors 0.20) does not open the folder"
        )
    unusual = {layer.group_size for layer in layers if layer.form == "int4"}
    unusual -= {None, *_COMMON_GROUP_SIZES}
    if unusual:
        sizes = ", ".join(str(size) for size in sorted(filter(None, unusual)))
        yield (
            f"group size {sizes}: vLLM's and SGLang's fast kernels take 32, 64, 128 or whole rows "
            "and may refuse it; transformers reads it"
        )
