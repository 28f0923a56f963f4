"""`adapter_config.json` of a LoRA adapter, as the PEFT library writes and reads it.

What would change the result and is not supported is refused by name. Settings that matter while
training only are skipped, and so are those that say where PEFT puts matrices by pattern: the
tensors show where they are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

__all__ = ["AdapterConfig", "PairSettings", "is_named", "parse_adapter_config", "render_adapter"]

PairSettings = tuple[int, float]
"""Rank r and alpha of one pair; its scale is alpha / r."""

# Settings that would change the result; these values do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Other beginnings (pissa, olora, corda, loftq) change the model's own weights as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
}  # fmt: skip
_READ = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "target_modules", "use_rslora"}
_PLAIN_KEY = re.compile(r"\^?[\w.]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What the file says about the matrices."""

    rank: int
    """r, where no pattern says otherwise."""
    alpha: float
    """Numerator of the scale, where no pattern says otherwise."""
    is_rank_stabilized: bool
    """Whether the scale is alpha / sqrt(r) (arXiv 2312.03732) and not alpha / r."""
    ranks: Mapping[str, int]
    """Ends of module names, or whole ones after `^`, with a rank of their own."""
    alphas: Mapping[str, float]
    """The same with an alpha of their own."""
    target_modules: tuple[str, ...] | None
    """Adapted modules, or the ends of their names; None: by a pattern, which is not evaluated."""

    def settings_of(self, module: str) -> PairSettings:
        """Rank and alpha of a module; a rank-stabilized alpha is turned into the plain one."""
        rank = next((self.ranks[key] for key in self.ranks if is_named(module, key)), self.rank)
        alpha = next((self.alphas[key] for key in self.alphas if is_named(module, key)), self.alpha)
        return rank, alpha * math.sqrt(rank) if self.is_rank_stabilized else alpha


def is_named(module: str, key: str) -> bool:
    """Whether `key` is the end of a module's name from a dot on, or all of it; `^`: all of it."""
    if key.startswith("^"):
        return module == key[1:]
    return module == key or module.endswith(f".{key}")


def parse_adapter_config(values: Mapping[str, Any], source: Path) -> AdapterConfig:
    """What `adapter_config.json` says.

    Raises:
        CheckpointError: a setting that is malformed, or that is not supported and would change the
            result; the message names `source` and the setting.
    """
    for name in sorted(_NEUTRAL.keys() & values.keys() | {"peft_type"}):
        value, allowed = values.get(name), _NEUTRAL[name]
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise CheckpointError(f"{source}: {name} = {value!r} is not supported")
    for name in sorted(values.keys() - _NEUTRAL.keys() - _WITHOUT_EFFECT - _READ):
        if values[name] not in (None, False, [], {}):
            raise CheckpointError(f"{source}: {name} = {values[name]!r} is not supported")
    is_rank_stabilized = values.get("use_rslora", False)
    if not isinstance(is_rank_stabilized, bool):
        raise CheckpointError(f"{source}: use_rslora must be true or false")
    ranks, alphas = (_pattern(values, name, source) for name in ("rank_pattern", "alpha_pattern"))
    return AdapterConfig(
        rank=_rank(values.get("r"), "r", source),
        alpha=_alpha(values.get("lora_alpha"), "lora_alpha", source),
        is_rank_stabilized=is_rank_stabilized,
        ranks={key: _rank(value, f"rank_pattern {key}", source) for key, value in ranks.items()},
        alphas={
            key: _alpha(value, f"alpha_pattern {key}", source) for key, value in alphas.items()
        },
        target_modules=_targets(values.get("target_modules"), source),
    )


def render_adapter(settings: Mapping[tuple[int, str], PairSettings]) -> dict[str, Any]:
    """`adapter_config.json` for adapted (layer, module) with their settings; at least one."""
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    layers = sorted({layer for layer, _ in settings})
    projections = sorted({module.rpartition(".")[2] for _, module in settings})
    is_regular = len(settings) == len(layers) * len(projections)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _as_number(alpha),
        "use_rslora": False,
        "rank_pattern": {
            module.removeprefix("model."): other
            for (_, module), (other, _) in settings.items()
            if other != rank
        },
        "alpha_pattern": {
            module.removeprefix("model."): _as_number(other)
            for (_, module), (_, other) in settings.items()
            if other != alpha
        },
        "target_modules": projections if is_regular else sorted(module for _, module in settings),
        "layers_to_transform": layers if is_regular else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
    }


def _as_number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _rank(value: object, name: str, source: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{source}: {name} must be a positive whole number, got {value!r}")
    return value


def _alpha(value: object, name: str, source: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise CheckpointError(f"{source}: {name} must be a number within 1e30, got {value!r}")
    return float(value)


def _pattern(values: Mapping[str, Any], name: str, source: Path) -> dict[str, Any]:
    """Module → value. Only plain names: anything else would be a regular expression to run."""
    pattern = values.get(name)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{source}: {name} must be an object, got {pattern!r}")
    for key in pattern:
        if not _PLAIN_KEY.fullmatch(key):
            raise CheckpointError(f"{source}: {name}: {key!r} is no plain module name")
    return pattern


def _targets(value: object, source: Path) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise CheckpointError(f"{source}: target_modules must be a list of names, got {value!r}")
    return tuple(value)
