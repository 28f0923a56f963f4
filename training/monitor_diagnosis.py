"""What a run's log says about its health, in words.

Every rule reads the lines of `training_log.jsonl` alone, so that an old log can be judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

__all__ = ["Finding", "RunFacts", "diagnose"]

Lines = Sequence[dict[str, Any]]

_VANISHED = 1e-3
"""Gradient of a layer, as a share of the largest layer's, below which it is called vanishing."""
_EXPLODED = 20.0
"""Growth of the gradient over the run's usual one that is called exploding."""
_SPIKE_NATS = 0.5
_SPIKE_SPREADS = 8.0
_LEAST_UPDATE, _MOST_UPDATE = 1e-5, 3e-2
_MANY_DEAD = 0.1
_MANY_REPEATS = 0.05
_HELD_OUT_RISE = 0.02
_UNEVEN_LOAD = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the rules need to know beside the log."""

    passes_per_step: float
    """Share of the text that a step reads."""
    repeated_share: float
    """Share of the text that stands in it earlier already (`monitor_repeats.py`)."""
    clip_norm: float
    """Largest norm of the gradient after clipping."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing."""

    kind: Literal["fine", "note", "warning"]
    """`fine`: nothing is wrong; `note`: good to know; `warning`: better done otherwise."""
    text: str
    """A sentence or two: what was seen, where, and what helps."""


def diagnose(lines: Lines, facts: RunFacts) -> list[Finding]:
    """What the lines of a log show, warnings first; one finding that says so if all is well."""
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    if not steps:
        return [Finding("note", "Nothing has been logged yet.")]
    rules: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _skipped(steps),
        lambda: _exploding(steps, facts),
        lambda: _vanishing(steps),
        lambda: _updates(steps),
        lambda: _spikes(steps),
        lambda: _dead(held_out),
        lambda: _overfitting(held_out, facts),
        lambda: _repeats(facts),
        lambda: _experts(steps),
    )
    found = [finding for rule in rules for finding in rule()]
    found.sort(key=lambda finding: finding.kind != "warning")
    return found or [
        Finding("fine", "Nothing unusual: gradients, updates and losses are in their usual ranges.")
    ]


def _skipped(steps: Lines) -> Iterator[Finding]:
    skipped = sum(line.get("skipped", 0) for line in steps)
    if skipped:
        yield Finding(
            "warning",
            f"{skipped} steps were skipped because their loss or gradient was not finite. A few at "
            "the start of a float16 run are its scale being found; else lower learning_rate.",
        )


def _exploding(steps: Lines, facts: RunFacts) -> Iterator[Finding]:
    if len(steps) < 6:
        return
    recent = median(line["grad_norm"] for line in steps[-3:])
    usual = median(line["grad_norm"] for line in steps[:-3])
    if recent > _EXPLODED * usual and recent > facts.clip_norm:
        yield Finding(
            "warning",
            f"The gradient explodes: its norm is {recent:.3g} at step {steps[-1]['step']}, "
            f"{recent / usual:.0f} times the usual {usual:.3g}. Lower learning_rate, lengthen "
            "warmup_steps or lower clip_norm.",
        )
    elif median(line["grad_norm"] for line in steps) > facts.clip_norm:
        share = sum(line["grad_norm"] > facts.clip_norm for line in steps) / len(steps)
        yield Finding(
            "note",
            f"{share:.0%} of the logged gradients were larger than clip_norm ({facts.clip_norm:g}) "
            "and were scaled down: the clipping, not learning_rate, sets the size of most steps.",
        )


def _vanishing(steps: Lines) -> Iterator[Finding]:
    norms = _recent(steps, "grad_norms")
    blocks = {name: norm for name, norm in norms.items() if name.startswith("layer")}
    if not blocks:
        return
    least, most = min(blocks, key=blocks.__getitem__), max(blocks, key=blocks.__getitem__)
    if blocks[least] < _VANISHED * blocks[most]:
        yield Finding(
            "warning",
            f"The gradient vanishes in {least}: its norm is {blocks[least]:.2g} beside "
            f"{blocks[most]:.2g} in {most}, so that {least} hardly learns. Fewer layers, a norm "
            "before each half block, or smaller initial weights help.",
        )


def _updates(steps: Lines) -> Iterator[Finding]:
    ratios = _recent(steps, "update_ratios")
    small = [name for name, ratio in ratios.items() if ratio < _LEAST_UPDATE]
    large = [name for name, ratio in ratios.items() if ratio > _MOST_UPDATE]
    if small and len(steps) > 3:
        yield Finding(
            "note",
            f"Steps change {_names(small)} by less than {_LEAST_UPDATE:g} of its weights: at the "
            "end of a schedule that is as it should be, before it a higher learning_rate is due.",
        )
    if large:
        yield Finding(
            "warning",
            f"Steps change {_names(large)} by more than {_MOST_UPDATE:.0%} of its weights each; "
            "lower learning_rate.",
        )


def _spikes(steps: Lines) -> Iterator[Finding]:
    spikes = []
    for index in range(5, len(steps)):
        before = [line["loss"] for line in steps[index - 5 : index]]
        usual = median(before)
        spread = median(abs(loss - usual) for loss in before)
        highest = steps[index].get("loss_max", steps[index]["loss"])
        if highest > usual + max(_SPIKE_NATS, _SPIKE_SPREADS * spread):
            spikes.append((steps[index].get("loss_max_step", steps[index]["step"]), highest, usual))
    if spikes:
        step, highest, usual = max(spikes, key=lambda spike: spike[1] - spike[2])
        yield Finding(
            "warning",
            f"{len(spikes)} loss {'spike' if len(spikes) == 1 else 'spikes'}; the largest at step "
            f"{step}: {highest:.2f} nats after {usual:.2f}. One that goes back at once is a batch "
            "of odd text; if they come again, lower learning_rate or clip_norm.",
        )


def _dead(held_out: Lines) -> Iterator[Finding]:
    shares = _recent(held_out, "dead_units")
    dead = {name: share for name, share in shares.items() if share > _MANY_DEAD}
    if dead:
        worst = max(dead, key=dead.__getitem__)
        yield Finding(
            "warning",
            f"{dead[worst]:.0%} of the feed-forward's units in {worst} are dead (on held-out text "
            f"they stay near zero), and more than {_MANY_DEAD:.0%} in {_names(list(dead))}: a "
            "smaller intermediate_size would do as much, or a lower learning_rate keep them alive.",
        )


def _overfitting(held_out: Lines, facts: RunFacts) -> Iterator[Finding]:
    if len(held_out) < 3:
        return
    best = min(held_out, key=lambda line: float(line["held_out_loss"]))
    last = held_out[-1]
    rise = last["held_out_loss"] - best["held_out_loss"]
    passes = last["step"] * facts.passes_per_step
    if rise > _HELD_OUT_RISE:
        yield Finding(
            "warning",
            f"Held-out loss was lowest at step {best['step']} ({best['held_out_loss']:.3f}) and "
            f"has risen by {rise:.3f} since, after {passes:.1f} passes over the text: the model "
            "learns it by heart. More text, dropout, fewer steps or early_stop help.",
        )
    elif passes > 4:
        yield Finding("note", f"The text has been read {passes:.1f} times.")


def _repeats(facts: RunFacts) -> Iterator[Finding]:
    if facts.repeated_share > _MANY_REPEATS:
        yield Finding(
            "warning",
            f"{facts.repeated_share:.0%} of the training text stands in it more than once (pieces "
            "of 32 tokens): the model will recite those. Remove duplicates from the text.",
        )


def _experts(steps: Lines) -> Iterator[Finding]:
    loads = _recent(steps, "expert_load")
    uneven = {name: load for name, load in loads.items() if load > _UNEVEN_LOAD}
    if uneven:
        worst = max(uneven, key=uneven.__getitem__)
        yield Finding(
            "warning",
            f"Tokens crowd on few experts: the busiest of {worst} gets {uneven[worst]:.1f} times "
            "its share. Raise balance_loss.",
        )


def _recent(lines: Lines, name: str) -> dict[str, float]:
    """The last line's figures of each layer, of those that have any."""
    return next((line[name] for line in reversed(lines) if name in line), {})


def _names(layers: list[str]) -> str:
    return ", ".join(layers) if len(layers) < 4 else f"{layers[0]} and {len(layers) - 1} others"
