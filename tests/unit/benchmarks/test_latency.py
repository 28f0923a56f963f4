"""What a prompt and a step cost: which settings are timed, and how long a second is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from llmserve.benchmarks.latency import (
    NUM_STEPS,
    LatencyOptions,
    bench_latency,
    measure_latency,
    parse_counts,
)
from llmserve.benchmarks.offline_engine import LlmEngine
from llmserve.errors import ConfigError
from support.models import make_model_folder


class ScriptedEngine:
    """A prompt costs 1 ms a token, a step 10 ms and 1 ms a sequence."""

    def __init__(self, max_seq_len: int = 4096) -> None:
        self.llm = self.engine = self.config = self.info = self
        self.max_seq_len, self.vocab_size = max_seq_len, 50
        self.seen: list[tuple[int, ...]] = []

    def prefill(self, prompt: list[int]) -> float:
        self.seen.append(tuple(prompt))
        return 0.001 * len(prompt)

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        self.seen += map(tuple, prompts)
        return num_tokens * (0.010 + 0.001 * len(prompts))


def test_every_setting_is_timed_in_each_repeat_with_new_prompts() -> None:
    engine = ScriptedEngine()
    options = LatencyOptions(model=Path("m"), sequences=(1, 4), contexts=(16, 32), repeats=2)
    rows = measure_latency(cast("LlmEngine", engine), options)
    assert [row.context for row in rows] == [16, 32]
    assert rows[1].prefill_s == pytest.approx([0.032, 0.032])
    assert rows[0].step_s[4] == pytest.approx([0.014, 0.014])
    assert len(engine.seen) == 3 * 2 * (1 + 1 + 4)  # one repeat is not counted
    assert len(set(engine.seen)) == len(engine.seen)


def test_context_that_does_not_fit_is_refused() -> None:
    options = LatencyOptions(model=Path("m"), sequences=(1,), contexts=(64,))
    engine = cast("LlmEngine", ScriptedEngine(max_seq_len=64 + NUM_STEPS + 1))
    with pytest.raises(ConfigError, match="need 98 tokens; the model has 97"):
        measure_latency(engine, options)


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1", "1,,2"])
def test_counts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--contexts takes whole numbers"):
        parse_counts(text, option="--contexts")
    assert parse_counts("8,1,8", option="--contexts") == (1, 8)


def test_command_times_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model_folder(tmp_path / "model")
    options = LatencyOptions(
        model=folder, runner="torch", sequences=(1, 2), contexts=(8,), repeats=1
    )
    assert bench_latency(options) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["benchmark"], result["engine"]) == ("latency", "llmserve torch")
    assert set(result["rows"][0]["step_ms"]) == {"1", "2"}
    assert result["limits"]["multiply_adds"] is None  # a CPU's products are not measured
    if result["limits"]["read_bytes"] is not None:
        row = result["rows"][0]
        assert all(share > 0 for share in row["step_shares"].values())
        assert "prefill_share" not in row
        assert table[-2].split() == ["context", "of", "products", "of", "memory,", "1",
                                     "of", "memory,", "2"]  # fmt: skip
    assert table[2].split() == ["context", "prefill,", "ms", "tokens/s", "step", "of", "1,", "ms",
                                "step", "of", "2,", "ms"]  # fmt: skip
