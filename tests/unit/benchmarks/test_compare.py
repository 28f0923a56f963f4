from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.benchmarks.compare import compare_results, read_results
from llmserve.cli import main
from llmserve.errors import ConfigError, DataError


def result(rate: float, ttft_ms: float, **more: Any) -> dict[str, Any]:
    """A result with 2 % wide intervals to either side."""
    figures = {"output_throughput": rate, "mean_ttft_ms": ttft_ms}
    intervals = {key: [value * 0.98, value * 1.02] for key, value in figures.items()}
    return {"request_throughput": None, **figures, "intervals": intervals, **more}


def bare(rate: float, ttft_ms: float) -> dict[str, Any]:
    """As another program saves it."""
    return result(rate, ttft_ms) | {"intervals": {}}


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_higher_rate_and_lower_latency_are_faster() -> None:
    rate, ttft = compare_results([result(100.0, 50.0)], [result(131.0, 60.0)])
    assert (rate.key, rate.verdict) == ("output_throughput", "faster")
    # Half widths of 2 % each add as squares: 2.8 %.
    assert rate.sentence() == "B is 1.31 times faster (95 %: 1.27-1.35)"
    assert (ttft.key, ttft.verdict) == ("mean_ttft_ms", "slower")
    assert ttft.sentence() == "B is 1.20 times slower (95 %: 1.17-1.23)"


def test_difference_within_the_noise_is_not_shown() -> None:
    rate, _ = compare_results([result(100.0, 50.0)], [result(102.0, 50.0)])
    assert rate.sentence() == "no difference shown (95 %: 0.99-1.05)"


def test_runs_scatter_decides_where_there_are_several() -> None:
    """The single intervals would show a difference; the runs are further apart than it."""
    a = [result(rate, 50.0) for rate in (90.0, 110.0, 100.0)]
    b = [result(rate, 40.0) for rate in (100.0, 120.0, 110.0)]
    rate, ttft = compare_results(a, b)
    assert rate.verdict == "no difference shown"
    assert (ttft.verdict, ttft.speedup.value) == ("faster", pytest.approx(1.25))
    assert (rate.a, rate.b) == (100.0, 110.0)


def test_results_without_intervals_need_two_runs_each() -> None:
    with pytest.raises(DataError, match="need 2 runs of each side"):
        compare_results([bare(100.0, 50.0)], [bare(110.0, 50.0)])
    with pytest.raises(DataError, match="need 2 runs of each side"):
        compare_results([result(100.0, 50.0)] * 2, [result(110.0, 50.0)])
    runs = [bare(rate, 50.0) for rate in (100.0, 101.0)]
    assert len(compare_results(runs, runs)) == 2


def test_figures_that_one_side_lacks_are_left_out() -> None:
    (only,) = compare_results([result(100.0, 0.0)], [result(100.0, 50.0)])
    assert only.key == "output_throughput"


def test_runs_of_different_loads_are_no_repeats() -> None:
    mixed = [result(100.0, 50.0, request_rate=rate) for rate in (1.0, 2.0)]
    with pytest.raises(ConfigError, match="runs of B differ in request_rate"):
        compare_results([result(100.0, 50.0)], mixed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not the result"),
        ('{"a": 1}', "no request_throughput"),
        ('{"request_throughput": 1, "intervals": []}', "intervals must be"),
    ],
)
def test_file_that_is_no_result_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "r.json")


def test_empty_folder_and_missing_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.json file"):
        read_results(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_results(tmp_path / "none.json")


def test_command_prints_sentences_and_one_json_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", result(100.0, 50.0, failed=2, request_rate=3.0))
    b = write(tmp_path / "b.json", result(131.0, 50.0, request_rate=4.0))
    assert main(["bench", "compare", str(a), str(b)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "note: the loads differ in request_rate" in lines
    assert any(line.startswith("note: one run of each") for line in lines)
    assert "note: 2 requests failed; they are in no latency" in lines
    assert any(line.endswith("B is 1.31 times faster (95 %: 1.27-1.35)") for line in lines)
    document = json.loads(last)
    assert document["num_runs"] == [1, 1]
    assert document["metrics"]["mean_ttft_ms"]["verdict"] == "no difference shown"


def test_folders_are_repeated_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, rate in enumerate((100.0, 102.0)):
        write(tmp_path / "a" / f"{number}.json", bare(rate, 50.0))
        write(tmp_path / "b" / f"{number}.json", bare(2 * rate, 50.0))
    assert main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["num_runs"] == [2, 2]
    assert document["metrics"]["output_throughput"]["verdict"] == "faster"
