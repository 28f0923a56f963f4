"""What each unit of a model costs in each form: measured, one unit changed at a time.

A unit is the layers that others join into one matrix (query, key and value; gate and input), or one
layer alone, or those of all experts of a block; its layers have one form. The cost is the KL
divergence of the model with that unit in that form from the original, over the beginning of the
calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmserve.checkpoint import Checkpoint
from llmserve.layouts import expected_tensors
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_model
from llmserve.quant.dtypes import NUMPY_DTYPES

from .calibrate import ActivationStream, InputStatistics
from .quant_block import quantize_block
from .quant_plan import LayerForm, parse_form, plan_layers
from .quant_store import BlockStore
from .search_front import Option

__all__ = ["UnitForms", "layer_bytes", "measure_units"]

_FORMS = ("int4:128", "int4:64", "int4:32", "int4:16", "int8:row", "float")
_FORMS_WITH_ZEROS = ("int4:128:zero", "int4:64:zero", "int4:32:zero", "int4:16:zero")
_MAX_TOKENS = 4096
_MAX_LOGITS = 1 << 26  # kept of the original, float32


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitForms:
    """The forms of one unit."""

    forms: tuple[dict[str, LayerForm], ...]
    """Of each option: layer → form."""
    options: tuple[Option, ...]
    """Size and cost of each."""


def measure_units(
    source: Checkpoint, windows: Sequence[Sequence[int]], *, has_zeros: bool,
    on_progress: Callable[[int, int], None], store: BlockStore | None = None,
) -> list[UnitForms]:  # fmt: skip
    """Every unit of the model with all its forms.

    Args:
        source: the model.
        windows: those of the calibration text.
        has_zeros: whether forms with zero points are tried too.
        on_progress: told how many units of how many are done.
        store: where costs are kept meanwhile; what it has is not measured again.

    Raises as `quantize_block` does.
    """
    texts = (*_FORMS, *_FORMS_WITH_ZEROS) if has_zeros else _FORMS
    plans = [plan_layers(source, parse_form(text)) for text in texts]
    meter: _Meter | None = None
    stream = ActivationStream(source, windows)
    units: list[UnitForms] = []
    total = len(_units(list(plans[0])))
    for index in range(source.config.num_layers):
        prefix = f"model.layers.{index}."
        names = [name for name in plans[0] if name.startswith(prefix)]
        tensors = {n: source.float32(n) for n in source.names() if n.startswith(prefix)}
        statistics: dict[str, InputStatistics] = {}
        for members in _units(names):
            forms = _distinct([{name: plan[name] for name in members} for plan in plans])
            key = f"unit-{len(units):05d}"
            costs = _kept_costs(store, key)
            if costs is None:
                meter = meter or _Meter(source, windows)
                statistics = statistics or stream.observe(index)
                costs = []
                for form in forms:
                    block = quantize_block(index, tensors, source.config, form, "best", statistics)
                    costs.append(
                        meter.kl({f"{n}.weight": q.dequantize() for n, q in block.layers.items()})
                    )
                if store is not None:
                    store.write_figures(key, [c if math.isfinite(c) else None for c in costs])
            options = tuple(
                Option(num_bytes=sum(layer_bytes(source, n, f) for n, f in form.items()), cost=cost)
                for form, cost in zip(forms, costs, strict=True)
            )
            units.append(UnitForms(forms=tuple(forms), options=options))
            on_progress(len(units), total)
        stream.advance(index, {})
    return units


def _kept_costs(store: BlockStore | None, key: str) -> list[float] | None:
    """Costs that were measured before; JSON has no infinity, so null stands for it."""
    kept = None if store is None else store.read_figures(key)
    return None if kept is None else [math.inf if cost is None else cost for cost in kept]


def layer_bytes(source: Checkpoint, layer: str, form: LayerForm) -> int:
    """Bytes of a layer of that form on disk, shape and scales included."""
    out, width = expected_tensors(source.config)[f"{layer}.weight"]
    if form.bits is None:
        return source.stored(f"{layer}.weight").nbytes
    groups = width // (form.group_size or width)
    num_bytes = out * groups * NUMPY_DTYPES[source.config.dtype].itemsize
    if form.bits == 8:
        return num_bytes + out * width + (0 if form.is_symmetric else out * groups)
    words = out * -(-width // 8) + (0 if form.is_symmetric else -(-out // 8) * groups)
    return num_bytes + 4 * words + 16


def _units(names: Sequence[str]) -> list[list[str]]:
    """Layers by block and place: what is joined, and all experts, are together."""
    units: dict[tuple[str, str], list[str]] = {}
    for name in names:
        block, _, inner = name.partition(".self_attn.")
        if not inner:
            block, _, inner = name.partition(".mlp.")
        kind = "shared" if "shared_expert" in inner else "experts" if "experts." in inner else ""
        last = inner.rpartition(".")[2]
        joined = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up_proj"}
        units.setdefault((block, kind + joined.get(last, last)), []).append(name)
    return list(units.values())


def _distinct(forms: list[dict[str, LayerForm]]) -> list[dict[str, LayerForm]]:
    kept: list[dict[str, LayerForm]] = []
    for form in forms:
        if form not in kept:
            kept.append(form)
    return kept


class _Meter:
    """The KL divergence of the model with some weights replaced from the original."""

    def __init__(self, source: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
        self._model: Transformer = load_model(source, dtype=torch.float32)
        self._targets = canonical_tensors(self._model)
        most = min(_MAX_TOKENS, max(64, _MAX_LOGITS // source.config.vocab_size))
        self._windows = _beginning(windows, most)
        self._original = self._logprobs()

    @torch.inference_mode()
    def kl(self, weights: Mapping[str, object]) -> float:
        """Nats per token."""
        kept = {name: self._targets[name].clone() for name in weights}
        for name, weight in weights.items():
            self._targets[name].copy_(torch.as_tensor(weight))
        total = count = 0.0
        for before, after in zip(self._original, self._logprobs(), strict=True):
            total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
            count += len(before)
        for name, weight in kept.items():
            self._targets[name].copy_(weight)
        found = total / count
        return max(0.0, found) if math.isfinite(found) else math.inf

    @torch.inference_mode()
    def _logprobs(self) -> list[Tensor]:
        """Of each window, [tokens, V]."""
        rows = [self._model(torch.tensor([window]))[0] for window in self._windows]
        return [logits.log_softmax(-1) for logits in rows]


def _beginning(windows: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    kept: list[list[int]] = []
    for window in windows:
        room = most - sum(map(len, kept))
        if room < 2:
            break
        kept.append(list(window[:room]))
    return kept
