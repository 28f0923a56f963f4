"""Quantizing to a contract: the smallest or the best model that keeps the bounds.

Each unit's cost in each form is measured by itself (`search_layers.py`), a Pareto front is computed
from them (`search_front.py`), and points of it are made and measured as whole models on the
evaluation text, which the choice of forms has not seen. A bound is kept if the upper end of the
95 % confidence interval keeps it. With a bound on the size the best model within it is taken, else
the smallest that keeps the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError, ExportError

from .evaluation_text import EvaluationText
from .measure import Comparison
from .quant_measure import Progress, measure_model
from .quant_options import Contract, QuantizationOptions
from .quant_plan import LayerForm
from .quant_store import BlockStore
from .quantize import QuantizedModel, quantize_layers
from .search_front import Point, pareto_front
from .search_layers import UnitForms, measure_units

__all__ = ["search_contract"]

_NUM_POINTS = 7
_NUM_REFINEMENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A point as a model."""

    place: int
    """On the front."""
    num_bytes: int
    """Of all tensors."""
    forms: dict[str, LayerForm]
    comparison: Comparison

    def excess(self, contract: Contract) -> float:
        """By which factor the worst bound is missed; at most 1: all are kept."""
        found = self.comparison
        upper_kl = found.mean_kl + (found.kl_margin or 0.0)
        upper_loss = found.loss_after - found.loss_before + (found.loss_margin or 0.0)
        pairs = (
            (max(0.0, math.expm1(upper_loss)), contract.max_perplexity_increase),
            (upper_kl, contract.max_kl),
            (self.num_bytes, contract.max_bytes),
        )
        return max(_ratio(value, bound) for value, bound in pairs if bound is not None)

    def describe(self) -> str:
        """One line of a table."""
        found = self.comparison
        margin = found.loss_margin or 0.0
        return (
            f"{self.num_bytes:>14,} bytes  KL {found.mean_kl:.6f} ± {found.kl_margin or 0:.6f}  "
            f"perplexity {found.perplexity_increase:+.3%} ± {margin:.3%}"
        )


def search_contract(
    source: Checkpoint, options: QuantizationOptions, calibration: EvaluationText,
    text: EvaluationText, on_progress: Progress, on_line: Callable[[str], None],
    store: BlockStore | None = None,
) -> QuantizedModel:  # fmt: skip
    """The best model that keeps `options.contract`.

    What was measured is kept in `store`, and what it has is not measured again.

    Raises:
        ConfigError: a text of one window, which gives no confidence interval.
        ExportError: no point of the front keeps it; the message has the nearest.
    """
    contract = options.contract
    assert contract is not None, "a search without bounds"
    if len(text.windows) < 2:
        raise ConfigError("the evaluation text fills one window; an interval needs two: give more")
    units = measure_units(
        source,
        calibration.windows,
        has_zeros=not options.is_symmetric,
        on_progress=lambda done, all_: on_progress("layer by layer", done, all_),
        store=store,
    )
    trial = _Trials(source, units, calibration, text, on_progress, store)
    found = [trial.measure(place) for place in trial.first_places(contract)]
    found += trial.refine(found, contract)
    kept = [one for one in found if one.excess(contract) <= 1.0]
    chosen = _best(kept, contract) if kept else None
    for one in sorted(found, key=lambda one: one.num_bytes):
        mark = "*" if one is chosen else " " if one in kept else "-"
        on_line(f"{mark} {one.describe()}")
    on_line("* chosen, - misses a bound; intervals of 95 %, bounds hold for their upper ends")
    if chosen is None:
        nearest = min(found, key=lambda one: one.excess(contract))
        raise ExportError(
            f"no mixture of forms keeps the bounds; the nearest misses one by a factor of "
            f"{nearest.excess(contract):.3f}: {nearest.describe().strip()}"
        )
    return trial.make(chosen.forms)


def _ratio(value: float, bound: float) -> float:
    if bound > 0:
        return value / bound
    return 0.0 if value <= 0 else math.inf


def _best(kept: list[_Measured], contract: Contract) -> _Measured:
    if contract.max_bytes is not None:
        return min(kept, key=lambda one: one.comparison.mean_kl)
    return min(kept, key=lambda one: one.num_bytes)


class _Trials:
    """Points of the front, made and measured."""

    def __init__(
        self, source: Checkpoint, units: list[UnitForms], calibration: EvaluationText,
        text: EvaluationText, on_progress: Progress, store: BlockStore | None,
    ) -> None:  # fmt: skip
        self._source, self._units = source, units
        self._calibration, self._text = calibration, text
        self._on_progress, self._store = on_progress, store
        self._front: list[Point] = pareto_front([unit.options for unit in units])
        layers = {name for unit in units for name in unit.forms[0]}
        self._rest = sum(
            source.stored(name).nbytes
            for name in source.names()
            if name.removesuffix(".weight") not in layers
        )
        self._num_measured = 0

    def first_places(self, contract: Contract) -> list[int]:
        """Places evenly along the front, up to the largest that fits."""
        bound = math.inf if contract.max_bytes is None else contract.max_bytes
        fits = [i for i, one in enumerate(self._front) if self._rest + one.num_bytes <= bound]
        last = max(fits, default=0)
        return sorted({round(last * step / (_NUM_POINTS - 1)) for step in range(_NUM_POINTS)})

    def refine(self, found: list[_Measured], contract: Contract) -> list[_Measured]:
        """Halve the gap between the smallest that keeps the bounds and what misses them below."""
        if contract.max_bytes is not None:
            return []
        more: list[_Measured] = []
        for _ in range(_NUM_REFINEMENTS):
            both = [*found, *more]
            good = [one.place for one in both if one.excess(contract) <= 1.0]
            bad = [one.place for one in both if one.excess(contract) > 1.0]
            below = [place for place in bad if good and place < min(good)]
            if not below or min(good) - max(below) < 2:
                break
            more.append(self.measure((min(good) + max(below)) // 2))
        return more

    def measure(self, place: int) -> _Measured:
        """The point at that place of the front as a model, on the evaluation text."""
        self._num_measured += 1
        point = self._front[place]
        forms: dict[str, LayerForm] = {}
        for unit, choice in zip(self._units, point.choices, strict=True):
            forms |= unit.forms[choice]
        return _Measured(
            place=place,
            num_bytes=self._rest + point.num_bytes,
            forms=forms,
            comparison=self._compare(forms, point),
        )

    def make(self, forms: dict[str, LayerForm]) -> QuantizedModel:
        """The model whose layers have these forms."""
        windows = self._calibration.windows
        return replace(
            quantize_layers(self._source, forms, "best", windows=windows), scheme="mixed"
        )

    def _compare(self, forms: dict[str, LayerForm], point: Point) -> Comparison:
        choices = hashlib.sha256(repr(tuple(point.choices)).encode()).hexdigest()
        kept = None if self._store is None else self._store.read_figures(f"point-{choices}")
        if kept is not None:
            return Comparison(**kept)
        comparison = measure_model(
            self._source, self.make(forms), self._text.windows,
            lambda stage, done, total: self._on_progress(
                f"measuring point {self._num_measured}", done, total
            ),
        )  # fmt: skip
        if self._store is not None:
            self._store.write_figures(f"point-{choices}", asdict(comparison))
        return comparison
