"""The comparison's order and figures, with engines that have a script for a speed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.benchmarks.offline_contenders import OfflineOptions
from llmserve.benchmarks.offline_limits import busy_process
from llmserve.benchmarks.offline_peers import (
    OfflineRounds,
    OfflineRow,
    offline_result,
    offline_table,
    over_best_peer,
)
from llmserve.errors import ConfigError

OPTIONS = OfflineOptions(
    model=Path("m"), sequences=(1, 3), prefill_len=6, input_len=4, output_len=5, repeats=2
)


def measure_rows(
    rows: list[OfflineRow], options: OfflineOptions, *, vocab_size: int
) -> OfflineRounds:
    rounds = OfflineRounds(
        rows, options, vocab_size=vocab_size, memory_rate=lambda: 3e10, rest=lambda: None
    )
    for _ in range(options.repeats):
        rounds.take()
    return rounds


class Scripted:
    """Notes what it is asked; its rates grow with every call."""

    def __init__(self, engine: str, calls: list[Any], step: float) -> None:
        self.description = {"engine": engine, "weights": "int4", "cache": "bf16", "versions": {}}
        self._calls, self._step, self._rate = calls, step, 0.0

    def prefill(self, prompt: list[int]) -> float:
        return self._note("prefill", [prompt])

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        assert num_tokens == OPTIONS.output_len
        return self._note("decode", prompts)

    def close(self) -> None:
        """Nothing runs."""

    def _note(self, task: str, prompts: list[list[int]]) -> float:
        self._calls.append((self.description["engine"], task, prompts))
        self._rate += self._step
        return self._rate


def rows_of(calls: list[Any]) -> list[OfflineRow]:
    speeds = {"llmserve native": 6.0, "llama.cpp": 2.0, "OpenVINO GenAI": 3.0}
    return [
        OfflineRow(scheme="int4", contender=Scripted(engine, calls, step))
        for engine, step in speeds.items()
    ]


def test_engines_take_turns_with_new_prompts_each_time() -> None:
    calls: list[Any] = []
    measure_rows(rows := rows_of(calls), OPTIONS, vocab_size=10_000)
    engines = [row.contender.description["engine"] for row in rows]
    assert [engine for engine, _, _ in calls] == engines * 3 * 3  # a warm-up and two repeats
    shapes = [(task, len(prompts), len(prompts[0])) for _, task, prompts in calls[::3]]
    assert shapes == [("prefill", 1, 6), ("decode", 1, 4), ("decode", 3, 4)] * 3
    prompts = [tuple(prompt) for _, _, group in calls for prompt in group]
    assert len(set(prompts)) == len(prompts)


def test_warm_up_does_not_count() -> None:
    measure_rows(rows := rows_of([]), OPTIONS, vocab_size=100)
    assert rows[1].rates == {
        "prefill 6": [8.0, 14.0],
        "decode 1": [10.0, 16.0],
        "decode 3": [12.0, 18.0],
    }


def test_busy_measurements_are_further_ones_without_a_warm_up() -> None:
    calls: list[Any] = []
    options = replace(OPTIONS, busy=(3,), repeats=1)
    measure_rows(rows := rows_of(calls), options, vocab_size=100)
    assert list(rows[0].rates) == ["prefill 6", "decode 1", "decode 3", "decode 3 busy"]
    assert len(calls) == 3 * (3 + 4)


def test_busy_process_runs_as_long_as_its_block() -> None:
    with busy_process() as pid:
        assert os.getpgid(pid)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_busy_takes_only_numbers_that_are_measured_alone_too() -> None:
    with pytest.raises(ConfigError, match=r"some of --sequences \(1,3\), got 2"):
        replace(OPTIONS, busy=(2,))


def test_ratio_is_taken_within_a_repeat_to_the_fastest_peer() -> None:
    ours, *peers = rows = rows_of([])
    ours.rates = {"decode 1": [10.0, 30.0, 8.0]}
    peers[0].rates = {"decode 1": [5.0, 5.0, 5.0]}
    peers[1].rates = {"decode 1": [1.0, 6.0, 4.0]}
    assert over_best_peer(ours, rows) == {"decode 1": 2.0}  # of 2, 5 and 1.6
    assert over_best_peer(ours, [ours]) is None


def test_result_has_medians_runs_and_what_ran() -> None:
    rounds = measure_rows(rows := rows_of([]), OPTIONS, vocab_size=100)
    result: dict[str, Any] = offline_result(OPTIONS, rows, rounds.memory_rates)
    assert result["memory_bytes_per_s"] == [3e10, 3e10]
    assert result["benchmark"] == "offline"
    ours, peer, _ = result["rows"]
    assert (peer["scheme"], peer["engine"], peer["weights"]) == ("int4", "llama.cpp", "int4")
    assert peer["measurements"]["prefill 6"] == {"median": 11.0, "runs": [8.0, 14.0]}
    assert peer["over_best_peer"] is None
    assert ours["over_best_peer"]["decode 3"] == 2.0


def test_table_shows_every_row_with_its_range() -> None:
    measure_rows(rows := rows_of([]), OPTIONS, vocab_size=100)
    lines = offline_table(rows).splitlines()
    assert lines[0].split()[-6:] == ["prefill", "6", "decode", "1", "decode", "3"]
    at = next(i for i, line in enumerate(lines) if line.startswith("llama.cpp: int4, bf16 cache"))
    assert lines[at].split()[-3:] == ["11.0", "13.0", "15.0"]
    assert lines[at + 1].split() == ["8.0-14.0", "10.0-16.0", "12.0-18.0"]
    assert sum("times the best peer" in line for line in lines) == 1
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("engine", ["llmserve native", "llmserve torch"])
def test_ours_are_told_by_their_name(engine: str) -> None:
    assert OfflineRow(scheme="int8", contender=Scripted(engine, [], 1.0)).is_ours
    assert not OfflineRow(scheme="int8", contender=Scripted("transformers", [], 1.0)).is_ours


def test_a_rest_comes_before_each_measurement() -> None:
    """Else threads of one engine that still spin keep a core from the next."""
    calls: list[Any] = []
    rests: list[int] = []
    rounds = OfflineRounds(
        rows_of(calls), OPTIONS, vocab_size=100, memory_rate=lambda: None,
        rest=lambda: rests.append(len(calls)),
    )  # fmt: skip
    rounds.take()
    assert rests == list(range(len(calls)))
