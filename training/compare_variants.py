"""Variants of a recipe to compare: each changes one thing, and all take the same arithmetic.

Equal compute means equal floating-point operations (`monitor_flops.py`): a variant whose token
costs more trains on fewer tokens. Counted are the products; what a variant costs beside them on a
given machine is seen in its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmserve.errors import ConfigError

from .recipe import TrainingRecipe

__all__ = ["AXES", "Variant", "make_variants", "with_equal_compute"]

Changes = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe under a name that a folder may have."""

    name: str
    """`base`, or axis and value, as `positions-learned`."""
    recipe: TrainingRecipe
    """What it trains by."""


def _fields(name: str, values: Sequence[str]) -> dict[str, Changes]:
    return {value: {name: value} for value in values}


def _heads(recipe: TrainingRecipe) -> dict[str, Changes]:
    """As many key heads as query heads, about half as many, and one."""
    heads = recipe.num_heads
    grouped = max(count for count in range(1, max(2, heads // 2 + 1)) if heads % count == 0)
    kinds = {"mha": heads, "gqa": grouped, "mqa": 1} if grouped > 1 else {"mha": heads, "mqa": 1}
    return {name: {"num_kv_heads": count} for name, count in kinds.items()}


def _experts(recipe: TrainingRecipe) -> dict[str, Changes]:
    """One feed-forward, and four or eight of which a token sees two of half the width."""
    routed = {"num_experts_per_token": 2, "expert_size": None}
    return {
        "dense": {"num_experts": None, "expert_size": None, "shared_expert_size": None},
        "moe4": {"num_experts": 4, **routed},
        "moe8": {"num_experts": 8, **routed},
    }


def _activations(recipe: TrainingRecipe) -> dict[str, Changes]:
    """Gated and plain feed-forwards with about as many weights (arXiv:2002.05202, section 2)."""
    is_gated = recipe.activation == "swiglu"
    size = recipe.intermediate_size
    gated, plain = (size, size * 3 // 2) if is_gated else (size * 2 // 3, size)
    return {
        "swiglu": {"activation": "swiglu", "intermediate_size": gated},
        "gelu": {"activation": "gelu", "intermediate_size": plain},
    }


AXES: dict[str, Callable[[TrainingRecipe], dict[str, Changes]]] = {
    "positions": lambda recipe: _fields("positions", ("rope", "learned", "sinusoidal", "none")),
    "norm": lambda recipe: _fields("norm", ("rmsnorm", "layernorm")),
    "activation": _activations,
    "heads": _heads,
    "experts": _experts,
    "optimizer": lambda recipe: _fields("optimizer", ("adamw", "muon")),
    "schedule": lambda recipe: _fields("schedule", ("cosine", "wsd", "constant")),
}
"""What can be varied: for a recipe, each value's name and the fields that it sets."""


def make_variants(base: TrainingRecipe, axes: Sequence[str]) -> list[Variant]:
    """The base and, one change at a time, every other value of each axis.

    Raises:
        ConfigError: an axis that there is not, or a base that cannot be varied so.
    """
    unknown = sorted(set(axes) - AXES.keys())
    if unknown:
        raise ConfigError(f"nothing called {', '.join(unknown)} to vary; known: {', '.join(AXES)}")
    if "experts" in axes and base.activation != "swiglu":
        raise ConfigError("to vary experts, the recipe needs the activation swiglu")
    if "activation" in axes and base.num_experts is not None:
        raise ConfigError("to vary activation, the recipe must have no num_experts")
    others = [
        Variant(f"{axis}-{name}", replace(base, **changes))
        for axis in axes
        for name, changes in AXES[axis](base).items()
        if any(getattr(base, field) != value for field, value in changes.items())
    ]
    return [Variant("base", base), *others]


def with_equal_compute(
    variants: Sequence[Variant], flops_of: Callable[[TrainingRecipe], int]
) -> list[Variant]:
    """The variants with as many steps as cost what the first one's steps cost.

    `flops_of` gives the operations of one token.
    """
    base = variants[0].recipe
    assert base.steps is not None, "compared recipes have steps"
    budget = base.steps * flops_of(base)
    return [
        Variant(one.name, replace(one.recipe, steps=max(1, round(budget / flops_of(one.recipe)))))
        for one in variants
    ]
