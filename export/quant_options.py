"""What a quantization was asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError

from .quant_plan import Method, Override, Scheme

__all__ = ["Contract", "QuantizationOptions"]

_INTEGERS = ("int8", "w8a8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """Bounds that the quantized model must keep; at least one is set."""

    max_perplexity_increase: float | None = None
    """Largest increase of perplexity, as a share: 0.01 is 1 %."""
    max_kl: float | None = None
    """Largest mean KL divergence, nats per token."""
    max_bytes: int | None = None
    """Most bytes of all tensors on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """One quantization. Raises `ConfigError` for a combination that means nothing."""

    scheme: Scheme = "int4"
    """What linear layers become; with a contract the search decides."""
    group_size: int | None = None
    """Integers: weights that share a scale; None: a whole row."""
    is_symmetric: bool = True
    """Integers: without zero points."""
    method: Method = "rtn"
    """Integers: how they are found."""
    overrides: tuple[Override, ...] = ()
    """Integers: exceptions for layers."""
    double_quant: bool = False
    """nf4, fp4: scales are quantized too."""
    has_int8_cache: bool = False
    """Integers: the folder asks for an int8 KV cache."""
    contract: Contract | None = None
    """Bounds to search for; None: as the fields above say."""
    calibration: Path | None = None
    """Text to calibrate on; None: `calibration.txt` of the model."""
    calibration_tokens: int = 32_768
    """Most tokens of it."""
    measure: bool = True
    """Run both models over a text and compare them."""
    text: Path | None = None
    """Text to measure on; None: `evaluation.txt` of the model."""
    max_tokens: int = 16_384
    """Most tokens of it."""

    def __post_init__(self) -> None:
        is_integer = self.scheme in _INTEGERS
        if self.double_quant and self.scheme not in ("nf4", "fp4"):
            raise ConfigError(f"--double-quant is a choice of nf4 and fp4, not of {self.scheme}")
        if self.has_int8_cache and not is_integer:
            raise ConfigError(
                f"--kv-cache int8 is recorded in int8 and int4 folders, not {self.scheme}"
            )
        if self.method == "smoothquant" and self.scheme != "w8a8":
            raise ConfigError(
                "--method smoothquant makes int8 activations easier: use --scheme w8a8"
            )
        if self.text is not None and not self.measure:
            raise ConfigError("--text is what is measured on; leave out --no-measure or --text")
        if self.calibration is not None and not self.is_calibrated:
            raise ConfigError("--method rtn reads no calibration text; leave out --calibration")
        if self.contract is not None and not self.measure:
            raise ConfigError("a bound is kept by measuring; leave out --no-measure")

    @property
    def is_calibrated(self) -> bool:
        """Whether a calibration text is read."""
        return self.method != "rtn" or self.contract is not None

    def plan(self) -> dict[str, Any]:
        """What decides the quantized weights, beside the model and the calibration text."""
        names = ("scheme", "group_size", "is_symmetric", "method", "double_quant")
        values = dataclasses.asdict(self)
        forms = [f"{one.name}={one.form}" for one in self.overrides]
        chosen = {name: values[name] for name in names}
        return {**chosen, "overrides": forms, "contract": values["contract"]}
