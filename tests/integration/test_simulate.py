"""`llmserve simulate` from the command line, on small traces and on the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.cli import main
from support.models import make_model_folder
from support.traces import azure_trace, mooncake_trace

COSTS = ("--cost-model", "base_ms=10,token_us=12,seq_us=5,context_ns=2")
LARGE = ("--max-num-seqs", "128", "--max-num-batched-tokens", "2048")


@pytest.fixture
def mooncake(tmp_path: Path) -> str:
    """Three rounds of a conversation, and the last question once more."""
    rows = [
        (0.0, 600, 5, [1, 2]),
        (5.0, 1400, 5, [1, 3, 4]),
        (9.0, 2000, 2, [1, 3, 5, 6]),
        (12.0, 2000, 2, [1, 3, 5, 6]),
    ]
    return str(mooncake_trace(tmp_path / "m.jsonl", rows))


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict]:
    assert main(["simulate", *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


def test_trace_is_played_and_reported(mooncake: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, document = simulate(capsys, "--trace", mooncake, *COSTS, "--goodput", "ttft:30")
    (run,) = document["runs"]
    assert (run["prefix_cache_block_hits"], run["prefix_cache_block_queries"]) == (7, 13)
    assert run["completed"] == document["num_requests"] == 4
    assert run["duration"] > 12.0
    # Nobody waits: a prompt takes its tokens' time, in steps of at most 512.
    assert run["slo_attainment"] == 0.5
    assert "prefix cache hits, blocks 53.85% (7 of 13)" in table


def test_sweep_has_a_run_for_each_size(mooncake: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, document = simulate(
        capsys, "--trace", mooncake, *COSTS, "--sweep-cache", "4,8,unbounded"
    )
    hits = [run["prefix_cache_block_hits"] for run in document["runs"]]
    assert [run["kv_cache_blocks"] for run in document["runs"]] == [4, 8, "unbounded"]
    assert hits[-1] == 7
    assert hits == sorted(hits)
    assert sum(line.lstrip().startswith(("4 ", "8 ", "unbounded ")) for line in table) == 3


def test_rounds_are_played_where_the_costs_say_what_a_step_pays_once(
    mooncake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for costs in ("base_ms=0.2", "base_ms=0.1,step_ms=0.1"):
        _, document = simulate(capsys, "--trace", mooncake, "--cost-model", costs)
        found.append(document["runs"][0]["num_steps"])
    assert found[0] > found[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv-cache-blocks", "3"], 2, "cannot hold the trace's longest request"),
        (["--sweep-cache", "unbounded,3"], 2, "cannot hold the trace's longest request"),
        (["--max-num-seqs", "0"], 2, "--max-num-seqs must be"),
        (["--cost-model", "none.json"], 2, "cannot read a cost model from none.json"),
        (["--cost-model", "token=1"], 2, "names token; known: base_ms"),
        (["--trace", "none"], 1, "cannot read the trace none"),
        (["--start", "13"], 1, "no request from 13 s on"),
        (["--scheduling-policy", "fair"], 1, "line 1: the request has no tenant"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(
    mooncake: str,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["simulate", "--trace", mooncake, *COSTS, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llmserve: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_costs_are_fitted_saved_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model_folder(tmp_path / "model")
    saved = tmp_path / "costs.json"
    trace = str(azure_trace(tmp_path / "a.csv", [(0, 100, 10), (1, 30, 5)]))
    limits = ("--max-num-seqs", "2", "--max-num-batched-tokens", "64")
    fit = ("--cost-model", f"fit:{model}", "--save-cost-model", str(saved))
    assert main(["simulate", *fit, *limits]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "steps of up to 64 tokens, 2 sequences" in captured.err
    measured = json.loads(saved.read_text())["measured"]
    assert measured["model"] == str(model)
    assert measured["num_steps"] > 10
    _, document = simulate(capsys, "--trace", trace, "--cost-model", str(saved), *limits)
    assert document["runs"][0]["completed"] == 2
    assert document["runs"][0]["mean_ttft_ms"] > 0


def test_costs_that_cannot_be_saved_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model_folder(tmp_path / "model")
    arguments = ["--cost-model", f"fit:{model}", "--save-cost-model", str(tmp_path / "no" / "c")]
    assert main(["simulate", *arguments, "--max-num-seqs", "1"]) == 1
    assert "cannot save the cost model" in capsys.readouterr().err


def repeated_blocks(path: Path, count: int | None) -> tuple[int, int]:
    """How many of the first requests' blocks were named before, and how many there are."""
    seen: set[int] = set()
    repeated = total = 0
    for line in path.read_text().splitlines()[:count]:
        keys = json.loads(line)["hash_ids"]
        repeated += sum(key in seen for key in keys)
        total += len(keys)
        seen.update(keys)
    return repeated, total


@pytest.mark.shared
@pytest.mark.parametrize(
    "count", [1000, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_unbounded_cache_hits_what_the_mooncake_trace_repeats(
    shared_folder: Path, count: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared_folder / "data" / "mooncake-trace" / "conversation_trace.jsonl"
    first = () if count is None else ("--num-requests", str(count))
    _, document = simulate(capsys, "--trace", str(path), *first, *COSTS, *LARGE)
    (run,) = document["runs"]
    hits = (run["prefix_cache_block_hits"], run["prefix_cache_block_queries"])
    assert hits == repeated_blocks(path, count)
    if count is None:
        assert hits == (105_710, 288_500)
    assert run["num_preemptions"] == 0


@pytest.mark.shared
@pytest.mark.parametrize(
    "count", [500, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_azure_trace_is_played_to_its_end(
    shared_folder: Path, count: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_folder / "data" / "azure-llm-trace-2023"
    path = folder / "AzureLLMInferenceTrace_conv.csv"
    first = () if count is None else ("--num-requests", str(count))
    _, document = simulate(capsys, "--trace", str(path), *first, *COSTS, *LARGE)
    (run,) = document["runs"]
    assert run["completed"] == (count or 19_366)
    assert run["prefix_cache_block_hit_rate"] is None
    # Every token but a request's last is computed, once each.
    computed = run["num_prefill_tokens"] + run["num_decode_tokens"]
    tokens = document["total_input_tokens"] + document["total_output_tokens"]
    assert computed == tokens - run["completed"]
