"""`llmserve plan` from the command line: a real, tiny model and a real server of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.benchmarks import plan
from llmserve.benchmarks.plan_options import PlanOptions
from llmserve.cli import main
from support.models import make_model_folder

pytestmark = pytest.mark.http

SHORT = ("--fit-seconds", "0.1", "--run-seconds", "0.1", "--probe-seconds", "0.2")
LOAD = ("--input-len", "4", "--output-len", "4", "--concurrency", "1,3", "--max-num-seqs", "4")


def test_plan_is_made_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PROBE_SHAPES", ((1, 4, 8), (4, 4, 2), (8, 4, 8)))
    monkeypatch.setattr(plan, "PROBE_S", 0.1)
    folder = make_model_folder(tmp_path / "m")
    assert main(["plan", str(folder), "--slo", "e2el:250", "--check", *SHORT, *LOAD]) == 0
    captured = capsys.readouterr()
    *table, last = captured.out.splitlines()
    document = json.loads(last)
    assert f"planned: llmserve serve {folder} --max-num-seqs 4" in table[1]
    assert [loop["max_concurrency"] for loop in document["loops"]] == [1, 3]
    for loop in document["loops"]:
        predicted, measured = (
            loop[side]["output_throughput"] for side in ("predicted", "measured")
        )
        assert loop["miss"] == pytest.approx(predicted / measured - 1)
    # More sequences than the server takes are no load to fit to.
    assert [load["max_concurrency"] for load in document["serving_loads"]] == [1, 4]
    assert "timing the engine's steps" in captured.err


@pytest.mark.parametrize(("runner", "repeats_decodes"), [("native", True), ("torch", False)])
def test_steps_have_several_rounds_where_the_planned_runner_takes_them(
    tmp_path: Path, runner: str, repeats_decodes: bool
) -> None:
    options = PlanOptions(
        model=make_model_folder(tmp_path / "m"),
        slos_ms={"e2el": 250.0},
        input_len=4,
        output_len=4,
        max_num_seqs=2,
        runner=runner,
        fit_s=0.01,
    )
    _, _, simulated, fit = plan._fitted_engine(options)
    assert simulated.repeats_decodes == repeats_decodes
    assert repeats_decodes or fit.cost.step_s == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slo", "speed:3"], "--slo takes NAME:MILLISECONDS"),
        (["--slo", "ttft:5", "--concurrency", "1,0"], "--concurrency takes whole numbers"),
        (["--slo", "ttft:5", "--output-len", "0"], "--output-len must be at least 1"),
        (["--slo", "ttft:5", "--run-seconds", "nan"], "--run-seconds must be above 0"),
        (["--slo", "ttft:5", "--probe-seconds", "0"], "--probe-seconds must be above 0"),
        (["--slo", "ttft:5", "--input-len", "9999"], "the context is"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(make_model_folder(tmp_path / "m")), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
