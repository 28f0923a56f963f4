"""What a step takes, as a sum: the one thing that a simulation knows about model and machine.

    seconds = step + the sum over its rounds of
              base + token * T + sequence * S + context * C + pair * P

T tokens computed in a round, S sequences in it, C context tokens whose keys and values are read,
once for each sequence, P pairs of a query and a key. A decode's cost is reading (C), that of a long
prompt's chunk is arithmetic (P): on a GPU a pair is some hundred times cheaper than a read, so
one coefficient cannot serve both. Vidur (Agrawal et al. 2024, arXiv:2405.05465, section 4) splits
a step the same way, with a learned curve for each part.

A step is one round, but for steps of decodes alone, which may draw several tokens for each sequence
(`llmserve/engine/rounds.py`). They share what the engine does for a step, and what the runner does
before and after its arithmetic. What either does for each sequence is counted with the rounds:
beside their arithmetic it could not be seen in the steps measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from llmserve.durable import write_json
from llmserve.errors import ConfigError
from llmserve.runners.protocol import Batch

__all__ = [
    "UNITS",
    "CostModel",
    "features",
    "load_cost_model",
    "parse_cost_model",
    "save_cost_model",
]

UNITS = {
    "base_ms": ("base_s", 1e-3),
    "token_us": ("token_s", 1e-6),
    "seq_us": ("sequence_s", 1e-6),
    "context_ns": ("context_s", 1e-9),
    "pair_ns": ("pair_s", 1e-9),
    "step_ms": ("step_s", 1e-3),
}
"""Name outside → field and its unit in seconds. Of two that a fit cannot tell apart the first one
carries the cost: in steps of one round alone, the base of the round."""

EXAMPLE = "base_ms=10,token_us=20,seq_us=5,context_ns=40,pair_ns=1"
PROVENANCE = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Coefficients in seconds, none below 0 and at least one above: time goes on in every step."""

    base_s: float = 0.0
    """Of a round, whatever is in it."""
    token_s: float = 0.0
    """For each token computed."""
    sequence_s: float = 0.0
    """For each sequence of a round."""
    context_s: float = 0.0
    """For each token of context, new ones included, of each sequence."""
    pair_s: float = 0.0
    """For each token computed and each token that it attends to, itself included."""
    step_s: float = 0.0
    """Of a step, however many rounds it has."""

    def __post_init__(self) -> None:
        for name, (field, unit) in UNITS.items():
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ConfigError(f"a cost cannot be below 0, got {name}={value / unit:g}")
        if not any(self.coefficients):
            raise ConfigError(f"one of {', '.join(UNITS)} must be above 0")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """In the order of `features`."""
        return tuple(getattr(self, field) for field, _ in UNITS.values())

    def seconds(self, batch: Batch) -> float:
        """What the step takes."""
        return sum(
            cost * count for cost, count in zip(self.coefficients, features(batch), strict=True)
        )

    def __str__(self) -> str:
        """As `parse_cost_model` reads it, to four digits."""
        values = zip(UNITS, self.outside().values(), strict=True)
        return ",".join(f"{name}={value:.4g}" for name, value in values)

    def outside(self) -> dict[str, float]:
        """Values by the names and in the units of `UNITS`."""
        return {name: getattr(self, field) / unit for name, (field, unit) in UNITS.items()}


def features(batch: Batch) -> tuple[int, int, int, int, int, int]:
    """What the coefficients are multiplied by, in their order. O(1) numpy calls."""
    num_rounds, num_tokens = batch.num_rounds, batch.num_tokens
    num_sequences = len(batch.context_lens)
    # Each round attends to one token more than the one before: 0 + 1 + 2 + ... for each sequence.
    grown = num_sequences * (num_rounds * (num_rounds - 1) // 2)
    return (
        num_rounds,
        num_rounds * num_tokens,
        num_rounds * num_sequences,
        num_rounds * int(batch.context_lens.sum()) + grown,
        num_rounds * (int(batch.positions.sum()) + num_tokens) + grown,
        1,
    )


def parse_cost_model(text: str) -> CostModel:
    """A model given inline, like `base_ms=10,token_us=20`; what is not named is 0.

    Raises:
        ConfigError: an unknown name, one given twice, or no number of at least 0.
    """
    values: dict[str, object] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or name in values:
            raise ConfigError(f"a cost model is like {EXAMPLE}, each name once; got {text!r}")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {value!r}") from None
    return _from_outside(values, "the cost model")


def load_cost_model(path: Path) -> CostModel:
    """A model saved by `save_cost_model`, or a JSON object with the same names.

    Raises:
        ConfigError: no such file, no JSON object, or what `parse_cost_model` refuses.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a cost model from {path}: {error}; give a JSON file, or values like "
            f"{EXAMPLE}, or fit:MODEL_FOLDER"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object with {', '.join(UNITS)}")
    return _from_outside({k: v for k, v in values.items() if k != PROVENANCE}, str(path))


def save_cost_model(path: Path, cost: CostModel, measured: dict[str, object]) -> None:
    """Write `cost` with `measured`, which says where it comes from. Raises `OSError`."""
    write_json(path, {**cost.outside(), PROVENANCE: measured})


def _from_outside(values: dict[str, object], source: str) -> CostModel:
    if unknown := sorted(values.keys() - UNITS.keys()):
        raise ConfigError(f"{source} names {', '.join(unknown)}; known: {', '.join(UNITS)}")
    fields = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{source}: {name} must be a number, got {value!r}")
        field, unit = UNITS[name]
        fields[field] = value * unit
    return CostModel(**fields)
