"""Each rule on a log that shows it, and silence on one that shows nothing."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.training.monitor_diagnosis import RunFacts, diagnose

FACTS = {"passes_per_step": 0.001, "repeated_share": 0.0, "clip_norm": 1.0}


def step_line(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": 10 * number,
        "loss": 5.0 - 0.1 * number,
        "loss_max": 5.05 - 0.1 * number,
        "loss_max_step": 10 * number - 4,
        "grad_norm": 0.5,
        "skipped": 0,
        "grad_norms": {"embedding": 0.3, "layer 0": 0.2, "layer 1": 0.3, "output": 0.01},
        "update_ratios": {"embedding": 1e-3, "layer 0": 1e-3, "layer 1": 2e-3, "output": 1e-3},
    }
    return line | changes


def healthy() -> list[dict[str, Any]]:
    steps = [step_line(number) for number in range(1, 13)]
    evaluations = [
        {"step": 40 * n, "held_out_loss": 5 - 0.3 * n, "dead_units": {"layer 0": 0.01}}
        for n in range(1, 4)
    ]
    return steps + evaluations


def texts(lines: list[dict[str, Any]], **facts: float) -> list[str]:
    return [finding.text for finding in diagnose(lines, RunFacts(**(FACTS | facts)))]


def test_healthy_run_is_called_so() -> None:
    findings = diagnose(healthy(), RunFacts(**FACTS))
    assert [finding.kind for finding in findings] == ["fine"]
    assert "nothing" in texts([])[0].lower()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skipped": 2}, ["2 steps were skipped"]),
        ({"grad_norm": 60.0}, ["explodes", "step 120", "120 times the usual 0.5"]),
        (
            {"grad_norms": {"embedding": 1.0, "layer 0": 1e-9, "layer 1": 0.5}},
            ["vanishes in layer 0", "1e-09 beside 0.5 in layer 1"],
        ),
        ({"update_ratios": {"layer 0": 0.2, "layer 1": 1e-3}}, ["layer 0 by more than 3%"]),
        ({"update_ratios": {"layer 0": 1e-7, "layer 1": 1e-3}}, ["layer 0 by less than 1e-05"]),
        ({"expert_load": {"layer 0": 1.2, "layer 1": 5.5}}, ["busiest of layer 1 gets 5.5 times"]),
        ({"loss_max": 9.0}, ["loss spikes", "at step 116"]),
    ],
)
def test_trouble_in_the_last_lines_is_named(changes: dict[str, Any], words: list[str]) -> None:
    lines = healthy()
    for line in lines[9:12]:
        line.update(changes if "skipped" not in changes or line["step"] == 120 else {})
    found = texts(lines)
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_single_spike_is_singular() -> None:
    lines = healthy()
    lines[8]["loss_max"] = 8.0
    assert texts(lines)[0].startswith("1 loss spike; the largest at step 86: 8.00 nats")


def test_gradients_that_are_always_clipped_are_noted() -> None:
    lines = [line | {"grad_norm": 3.0} if "loss" in line else line for line in healthy()]
    assert "100% of the logged gradients" in texts(lines)[0]


def test_dead_units_are_named_with_their_layer() -> None:
    lines = healthy()
    lines[-1]["dead_units"] = {"layer 0": 0.02, "layer 1": 0.4}
    assert "40% of the feed-forward's units in layer 1 are dead" in texts(lines)[0]


def test_rising_held_out_loss_is_learning_by_heart() -> None:
    lines = healthy()
    lines[-1]["held_out_loss"] = 5.5
    found = texts(lines, passes_per_step=0.05)
    assert "lowest at step 80 (4.400)" in found[0]
    assert "risen by 1.100 since, after 6.0 passes" in found[0]


def test_many_passes_and_repeats_are_said() -> None:
    assert texts(healthy(), passes_per_step=0.05) == ["The text has been read 6.0 times."]
    assert "30% of the training text" in texts(healthy(), repeated_share=0.3)[0]


def test_warnings_come_first() -> None:
    kinds = [
        finding.kind
        for finding in diagnose(
            healthy(), RunFacts(**(FACTS | {"passes_per_step": 0.05, "repeated_share": 0.3}))
        )
    ]
    assert kinds == ["warning", "note"]
